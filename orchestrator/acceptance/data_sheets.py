"""What data sheets say of GPUs: a hint, since no product reaches its peak, and chips of one name differ in power."""

from __future__ import annotations

from typing import NamedTuple

LOW_SHARE = 0.5
"""Share of the data sheet's rate below which it is worth a look. Large products reach 60 to 90 %."""


class Sheet(NamedTuple):
    """Rates without sparsity; None for what the chip does not have."""

    gpu_matrix_fp32: float | None
    """TFLOP/s."""
    gpu_matrix_tf32: float | None
    gpu_matrix_fp16: float | None
    gpu_matrix_bf16: float | None
    gpu_memory: float | None
    """GB/s."""


_V100 = (None, 125.0, None, 900.0)
"""nvidia.com, "NVIDIA V100 Tensor Core GPU", data sheet, January 2020."""

SHEETS = {
    # "NVIDIA H100 Tensor Core GPU", data sheet; its figures for tensor cores are with sparsity, twice of these.
    "NVIDIA H100 80GB HBM3": Sheet(67.0, 494.5, 989.5, 989.5, 3350.0),
    "NVIDIA H100 PCIe": Sheet(51.0, 378.0, 756.5, 756.5, 2000.0),
    "NVIDIA H100 NVL": Sheet(60.0, 417.5, 835.5, 835.5, 3900.0),
    # "NVIDIA H200 Tensor Core GPU", data sheet, likewise with sparsity.
    "NVIDIA H200": Sheet(67.0, 494.5, 989.5, 989.5, 4800.0),
    # "NVIDIA A100 Tensor Core GPU", data sheet.
    "NVIDIA A100-SXM4-80GB": Sheet(19.5, 156.0, 312.0, 312.0, 2039.0),
    "NVIDIA A100-SXM4-40GB": Sheet(19.5, 156.0, 312.0, 312.0, 1555.0),
    "NVIDIA A100 80GB PCIe": Sheet(19.5, 156.0, 312.0, 312.0, 1935.0),
    "NVIDIA A100-PCIE-40GB": Sheet(19.5, 156.0, 312.0, 312.0, 1555.0),
    # "NVIDIA L4 Tensor Core GPU" and "NVIDIA L40S", data sheets, with sparsity.
    "NVIDIA L4": Sheet(30.3, 60.0, 121.0, 121.0, 300.0),
    "NVIDIA L40S": Sheet(91.6, 183.0, 362.0, 362.0, 864.0),
    # "NVIDIA A10 Tensor Core GPU", data sheet.
    "NVIDIA A10": Sheet(31.2, 62.5, 125.0, 125.0, 600.0),
    # "NVIDIA T4", data sheet; its memory is said to reach 320 GB/s on the sheet's first issues, 300 on later ones.
    "Tesla T4": Sheet(8.1, None, 65.0, None, 300.0),
    "Tesla V100-SXM2-16GB": Sheet(15.7, *_V100),
    "Tesla V100-SXM2-32GB": Sheet(15.7, *_V100),
    "Tesla V100-PCIE-16GB": Sheet(14.0, None, 112.0, None, 900.0),
    "Tesla V100-PCIE-32GB": Sheet(14.0, None, 112.0, None, 900.0),
}
"""By the name that NVIDIA's driver gives a GPU; at the boost clock, which a chip under full load may not hold."""


def sheet_rate(gpu: str, key: str) -> float | None:
    """What the data sheet of a GPU has for a quantity, in its unit; None where it is not known."""
    sheet = SHEETS.get(gpu)
    rate: float | None = getattr(sheet, key, None)
    return rate
