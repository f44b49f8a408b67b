// Makes the library importable as hiprune_kernels._C; loading it registers the operators of the other files.
#include <Python.h>

extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
