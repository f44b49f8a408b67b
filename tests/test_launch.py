"""The short way of launching Triton kernels, with stand-ins for the kernel and what it compiles to."""

import pytest
import torch

kernels = pytest.importorskip("hiprune_kernels.kernels", reason="Triton is not installed")


class Kernel:
    """Compiles for every launch that reaches it; what it compiled to takes arguments by position."""

    arg_names = ("x_ptr", "scale", "rows", "strides", "BLOCK")

    def __init__(self, compiles=True):
        self.compiled, self.launched, self.compiles = [], [], compiles

    def __getitem__(self, grid):
        def launch(**options):
            warps, stages = options.pop("num_warps"), options.pop("num_stages")
            self.compiled.append((warps, stages, *(options[name] for name in self.arg_names)))
            return Compiled(self) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(kernels, "_COMPILED", {})


def launch(kernel, x, scale=0.5, rows=7, strides=(3, 1), block=64, grid=(5,), warps=4, stages=3):
    arguments = {"strides": strides, "x_ptr": x, "rows": rows, "scale": scale}
    arguments = {"x_ptr": x, **arguments}  # a tensor comes first; else the order is the caller's
    kernels.launch(kernel, grid, arguments, {"BLOCK": block}, warps, stages)


def test_the_second_launch_takes_what_the_first_compiled():
    kernel, x, y = Kernel(), torch.zeros(64), torch.ones(64)
    launch(kernel, x)
    assert len(kernel.compiled) == 1
    assert not kernel.launched  # Triton's own way launches as it compiles
    launch(kernel, y)
    launch(kernel, y, grid=(2, 3))
    assert len(kernel.compiled) == 1
    assert [grid for grid, _ in kernel.launched] == [(5, 1, 1), (2, 3, 1)]
    for _, arguments in kernel.launched:
        assert arguments[0] is y
        assert arguments[1:] == (0.5, 7, (3, 1), 64)


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.25}, {"rows": 16}, {"strides": (3, 2)}, {"block": 32}, {"warps": 8}, {"stages": 2}],
    ids=lambda change: next(iter(change)),
)
def test_what_may_compile_otherwise_goes_to_triton(change):
    kernel, x = Kernel(), torch.zeros(64)
    launch(kernel, x)
    launch(kernel, x, **change)
    assert len(kernel.compiled) == 2
    assert not kernel.launched


@pytest.mark.parametrize("other", [torch.zeros(64).half(), torch.zeros(65)[1:], None], ids=["dtype", "address", "none"])
def test_tensors_of_another_kind_go_to_triton(other):
    kernel, x = Kernel(), torch.zeros(64)
    for second in (x, other):
        arguments = {"x_ptr": x, "scale": second, "rows": 7, "strides": (3, 1)}
        kernels.launch(kernel, (1,), arguments, {"BLOCK": 64}, 4, 3)
    assert len(kernel.compiled) == 2


def test_other_devices_and_other_kernels_go_to_triton():
    first, second, x = Kernel(), Kernel(), torch.zeros(64)
    launch(first, x)
    launch(second, x)
    launch(first, x.to("meta"))
    assert (len(first.compiled), len(second.compiled)) == (2, 1)
    assert not first.launched


def test_the_interpreter_compiles_nothing_to_keep():
    kernel, x = Kernel(compiles=False), torch.zeros(64)
    launch(kernel, x)
    launch(kernel, x)
    assert len(kernel.compiled) == 2


def test_ever_new_sizes_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(kernels, "_MOST_COMPILED", 10)
    kernel, x = Kernel(), torch.zeros(64)
    for rows in range(35):
        launch(kernel, x, rows=rows)
    assert len(kernels._COMPILED) <= 10
    launch(kernel, x, rows=34)
    assert len(kernel.compiled) == 35
