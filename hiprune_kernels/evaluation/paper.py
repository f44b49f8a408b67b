"""What the HiPrune paper reports, as pure data: its tables 2, 3, 4, 8 and 9, as printed there.

None of it was measured here. Rows are of the paper's authors, those of other methods partly quoted from others.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models"


class Row(NamedTuple):
    """A line of a table; None where the paper prints a dash."""

    tokens: int | None  # kept; None where they depend on the image
    percent: float  # of all tokens
    method: str  # "" for the whole model
    values: tuple[float | None, ...]
    average: float | None  # in percent of the whole model, over all columns, as printed


class Table(NamedTuple):
    number: int
    model: str
    checkpoints: tuple[str, ...]  # how names of its checkpoints on the hub end, in lower case
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


class Benchmark(NamedTuple):
    """A task of lmms-eval that a column of the tables stands for."""

    column: str
    metrics: tuple[str, ...]  # of the task; their sum is the figure
    scale: float  # from lmms-eval's figure to the table's


BENCHMARKS: dict[str, Benchmark] = {
    "gqa": Benchmark("GQA", ("exact_match",), 100.0),
    "mmbench_en_dev": Benchmark("MMB", ("gpt_eval_score",), 1),
    "mmbench_cn_dev": Benchmark("MMB-CN", ("gpt_eval_score",), 1),
    "mme": Benchmark("MME", ("mme_perception_score", "mme_cognition_score"), 1),
    "pope": Benchmark("POPE", ("pope_f1_score",), 100.0),
    "scienceqa_img": Benchmark("SQA-IMG", ("exact_match",), 100.0),
    "vqav2_val": Benchmark("VQA-V2", ("exact_match",), 100.0),
    "textvqa_val": Benchmark("VQA-Text", ("exact_match",), 100.0),
    "vizwiz_vqa_val": Benchmark("VizWiz", ("exact_match",), 100.0),
}

_NINE = ("GQA", "MMB", "MMB-CN", "MME", "POPE", "SQA-IMG", "VQA-V2", "VQA-Text", "VizWiz")
_FIVE = ("MMB", "MMB-CN", "POPE", "SQA-IMG", "VizWiz")
_EIGHT = ("GQA", "MMB", "MMB-CN", "MME", "POPE", "SQA-IMG", "VQA-Text", "VizWiz")

TABLES: tuple[Table, ...] = (
    Table(
        2,
        "LLaVA-1.5-7B",
        ("llava-1.5-7b-hf", "llava-v1.5-7b"),
        _NINE,
        (
            Row(576, 100.0, "", (61.9, 64.7, 58.1, 1862, 85.9, 69.5, 78.5, 58.2, 50.0), 100.0),
            Row(192, 33.3, "ToMe", (54.3, 60.5, None, 1563, 72.4, 65.2, 68.0, 52.1, None), 88.5),
            Row(192, 33.3, "FastV", (52.7, 61.2, 57.0, 1612, 64.8, 67.3, 67.1, 52.5, 50.8), 90.4),
            Row(192, 33.3, "HiRED", (58.8, 62.6, 54.5, 1742, 83.0, 67.9, 75.0, None, 51.1), 96.4),
            Row(192, 33.3, "TRIM", (59.9, 64.1, 53.6, 1765, 87.1, 67.8, 76.2, 54.9, 50.4), 97.1),
            Row(192, 33.3, "PyramidDrop", (57.3, 63.3, 56.8, 1797, 82.3, 69.0, 75.1, 56.5, 51.1), 97.2),
            Row(192, 33.3, "VisionZip", (59.3, 63.0, None, 1783, 85.3, 68.9, 76.8, 57.3, None), 97.7),
            Row(192, 33.3, "SparseVLM", (59.5, 64.1, 58.0, 1780, 85.4, 68.8, 77.0, 57.7, 50.6), 98.6),
            Row(192, 33.3, "HiPrune", (59.2, 62.8, 57.0, 1814, 86.1, 68.9, 76.7, 57.6, 54.5), 99.3),
            Row(128, 22.2, "ToMe", (52.4, 53.3, 48.8, 1343, 62.8, 59.6, 63.0, 49.1, 50.2), 83.0),
            Row(128, 22.2, "FastV", (49.6, 56.1, 56.4, 1490, 59.6, 60.2, 61.8, 50.6, 51.3), 85.4),
            Row(128, 22.2, "HiRED", (57.1, 61.7, 53.9, 1714, 79.8, 68.1, 73.5, None, 51.4), 95.0),
            Row(128, 22.2, "TRIM", (58.9, 63.3, 51.5, 1732, 87.2, 68.4, 74.8, 52.7, 50.6), 95.7),
            Row(128, 22.2, "PyramidDrop", (57.1, 61.6, 56.6, 1761, 82.3, 68.4, 72.9, 56.6, 51.0), 96.2),
            Row(128, 22.2, "VisionZip", (57.6, 62.0, None, 1762, 83.2, 68.9, 75.6, 56.8, None), 96.2),
            Row(128, 22.2, "SparseVLM", (53.8, 64.4, 58.1, 1761, 85.0, 68.5, 76.3, 56.7, 50.2), 97.0),
            Row(128, 22.2, "HiPrune", (57.3, 62.2, 56.4, 1782, 82.8, 68.3, 74.9, 56.64, 54.3), 97.5),
            Row(64, 11.1, "ToMe", (48.6, 43.7, 38.9, 1138, 52.5, 50.0, 57.1, 45.3, 50.2), 73.1),
            Row(64, 11.1, "FastV", (46.1, 48.0, 52.7, 1256, 48.0, 51.1, 55.0, 47.8, 50.8), 76.7),
            Row(64, 11.1, "HiRED", (54.6, 60.2, 51.3, 1595, 73.7, 68.2, 69.8, None, 53.3), 91.8),
            Row(64, 11.1, "TRIM", (56.9, 61.5, 44.9, 1603, 86.7, 69.0, 71.9, 50.0, 50.6), 92.1),
            Row(64, 11.1, "PyramidDrop", (47.5, 58.8, 50.5, 1561, 55.9, 69.2, 69.2, 50.6, 50.7), 86.7),
            Row(64, 11.1, "VisionZip", (55.1, 60.1, None, 1690, 77.0, 69.0, 72.4, 55.5, None), 92.7),
            Row(64, 11.1, "SparseVLM", (53.7, 60.1, 52.5, 1559, 77.5, 69.7, 70.2, 53.4, 50.4), 91.8),
            Row(64, 11.1, "HiPrune", (53.6, 59.5, 53.4, 1646, 73.0, 68.9, 69.2, 54.9, 54.4), 92.7),
        ),
    ),
    Table(
        3,
        "LLaVA-NeXT-7B",
        ("llava-v1.6-vicuna-7b-hf", "llava-v1.6-vicuna-7b"),
        _FIVE,
        (
            Row(2880, 100.0, "", (65.8, 57.3, 86.8, 67.5, 55.2), 100.0),
            Row(640, 22.2, "FastV", (63.1, 53.5, 79.5, 67.4, 53.9), 95.7),
            Row(640, 22.2, "HiRED", (66.0, 57.0, 85.0, 68.3, 59.1), 101.2),
            Row(640, 22.2, "TRIM", (66.8, 55.8, 86.9, 66.9, 54.8), 99.5),
            Row(640, 22.2, "VisionZip", (66.3, 58.1, 86.3, 68.1, 57.1), 101.2),
            Row(640, 22.2, "SpaVLM", (65.9, 58.6, 85.3, 67.6, 53.6), 99.6),
            Row(640, 22.2, "PDrop", (64.1, 55.2, 83.8, 66.7, 53.8), 97.3),
            Row(640, 22.2, "HiPrune", (67.0, 59.3, 85.3, 68.0, 59.9), 102.6),
            Row(320, 11.1, "FastV", (53.4, 42.5, 49.5, 66.6, 51.3), 80.8),
            Row(320, 11.1, "HiRED", (64.2, 56.4, 83.3, 66.8, 58.3), 99.3),
            Row(320, 11.1, "TRIM", (63.5, 51.0, 86.5, 66.2, 53.5), 96.0),
            Row(320, 11.1, "VisionZip", (63.1, 55.6, 82.1, 67.3, 56.2), 97.8),
            Row(320, 11.1, "SpaVLM", (63.1, 56.7, 76.9, 67.2, 54.2), 96.2),
            Row(320, 11.1, "PDrop", (55.5, 44.7, 60.8, 66.7, 49.7), 84.3),
            Row(320, 11.1, "HiPrune", (65.3, 57.0, 78.9, 67.3, 59.9), 99.5),
            Row(160, 5.6, "TRIM", (61.6, 45.2, 84.8, 65.5, 52.9), 92.6),
            Row(160, 5.6, "VisionZip", (60.1, 50.4, 74.8, 68.3, 55.5), 93.5),
            Row(160, 5.6, "HiPrune", (59.8, 50.7, 67.7, 68.7, 57.2), 92.5),
        ),
    ),
    Table(
        4,
        "Qwen2.5-VL-3B",
        ("qwen2.5-vl-3b-instruct",),
        _FIVE,
        (
            Row(None, 100.0, "", (77.3, 73.0, 87.0, 80.4, 68.3), 100.0),
            Row(None, 33.3, "FastV", (74.4, 70.6, 85.0, 79.3, 66.9), 97.4),
            Row(None, 33.3, "VisionZip", (74.9, 69.8, 85.4, 80.1, 67.1), 97.7),
            Row(None, 33.3, "HiPrune", (75.8, 71.3, 86.0, 80.0, 67.5), 98.6),
            Row(None, 22.2, "FastV", (72.4, 69.2, 82.7, 79.6, 66.2), 95.9),
            Row(None, 22.2, "VisionZip", (73.5, 67.4, 84.6, 80.0, 66.3), 96.2),
            Row(None, 22.2, "HiPrune", (74.0, 69.3, 84.7, 80.3, 66.5), 97.1),
            Row(None, 11.1, "FastV", (56.2, 60.7, 73.3, 79.3, 63.8), 86.4),
            Row(None, 11.1, "VisionZip", (67.8, 63.3, 80.2, 79.5, 62.8), 91.5),
            Row(None, 11.1, "HiPrune", (69.6, 65.2, 80.4, 78.9, 64.2), 92.8),
        ),
    ),
    Table(
        8,
        "LLaVA-1.5-13B",
        ("llava-1.5-13b-hf", "llava-v1.5-13b"),
        _NINE,
        (
            Row(576, 100.0, "", (63.2, 67.7, 63.5, 1818, 85.9, 72.8, 80.0, 61.3, 53.6), None),
            Row(192, 33.3, "HiPrune", (59.4, 67.1, 62.5, 1798, 85.4, 73.7, 78.0, 59.5, 55.6), None),
            Row(128, 22.2, "HiPrune", (57.9, 66.8, 63.1, 1730, 82.8, 74.1, 76.1, 58.3, 54.9), None),
            Row(64, 11.1, "HiPrune", (54.2, 64.8, 59.2, 1634, 72.4, 74.6, 70.3, 56.7, 56.0), None),
        ),
    ),
    Table(
        8,
        "LLaVA-NeXT-13B",
        ("llava-v1.6-vicuna-13b-hf", "llava-v1.6-vicuna-13b"),
        _NINE,
        (
            Row(2880, 100.0, "", (64.4, 68.5, 61.2, 1901, 85.3, 73.1, 82.3, 63.2, 59.1), None),
            Row(640, 22.2, "HiPrune", (62.6, 70.2, 65.3, 1877, 84.9, 71.6, 80.0, 61.6, 61.1), None),
            Row(320, 11.1, "HiPrune", (59.3, 68.6, 64.9, 1800, 79.7, 72.1, 75.7, 60.1, 59.2), None),
            Row(160, 5.6, "HiPrune", (54.4, 66.3, 61.3, 1647, 71.0, 70.9, 68.4, 57.1, 55.9), None),
        ),
    ),
    Table(
        9,
        "Qwen2.5-VL-7B",
        ("qwen2.5-vl-7b-instruct",),
        _EIGHT,
        (
            Row(None, 100.0, "", (60.5, 83.2, 80.1, 2331, 86.2, 87.4, 83.1, 70.4), None),
            Row(None, 33.3, "HiPrune", (58.9, 82.6, 79.5, 2303, 85.1, 86.8, 78.2, 69.2), None),
            Row(None, 22.2, "HiPrune", (57.1, 80.3, 77.6, 2189, 84.0, 85.3, 74.0, 68.9), None),
            Row(None, 11.1, "HiPrune", (52.5, 76.1, 73.7, 2000, 79.8, 82.7, 62.4, 66.9), None),
        ),
    ),
)


def table_of(source: str) -> Table | None:
    """The table of a checkpoint, by the end of its name; None if the paper has none.

    Example:
        >>> table_of("llava-hf/llava-1.5-7b-hf").number
        2
    """
    name = source.rstrip("/").lower()
    return next((table for table in TABLES if name.endswith(table.checkpoints)), None)
