"""GPUs and their rates, for the plan of `internvl check --plan`. Imports no torch.

`products` and `copies` were measured on an H200 (789 to 812 TFLOP/s and 4.25 TB/s, torch 2.11). For
other GPUs the same shares of the peak are assumed.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from internvl.errors import UnknownGpu


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    name: str
    # Not the nominal size: the driver keeps some.
    memory_gib: float
    """Total memory as torch reports it, GiB."""
    tflops: float
    """Peak of dense bfloat16 matrix products with float32 accumulation, TFLOP/s, by the maker."""
    tb_per_s: float
    """Peak memory bandwidth, TB/s, by the maker."""
    products: float = 0.80
    """Share of `tflops` that an 8192³ product of random matrices reaches."""
    copies: float = 0.885
    """Share of `tb_per_s` that a device copy reaches."""
    measured: bool = False
    """True if `products` and `copies` were measured on this model."""
    float8: bool = True
    """True if it has float8 matrix products: compute capability 8.9 and above."""
    link_gb: float = 32.0
    """Peak rate between the GPUs of a machine, each way, GB/s: NVLink, else PCIe."""

    def link_gb_per_s(self, num_gpus: int) -> float:
        """Returns the rate at which each of a group of GPUs sends and receives, GB/s."""
        inside = self.link_gb * LINKS.share
        if num_gpus <= LINKS.gpus_per_node:
            return inside
        # Every GPU has a card of its own, and a ring that crosses goes through all of them.
        return min(inside, LINKS.gpus_per_node * LINKS.network_gb * LINKS.share)


@dataclass(frozen=True)
class Links:
    """Links between GPUs. Assumed: not measured."""

    gpus_per_node: int = 8
    network_gb: float = 50.0
    """Rate of a GPU's network card, GB/s: 400 Gb/s."""
    share: float = 0.78
    """Share of a link's peak that a collective of large messages reaches."""
    hidden: float = 0.9
    """Share of the computation's time that messages can hide behind."""


LINKS = Links()


_ROWS = (
    Gpu("B200", 178.4, 2250.0, 8.0, link_gb=900.0),
    Gpu("H200", 139.8, 989.4, 4.8, measured=True, link_gb=450.0),
    Gpu("H100-80", 79.2, 989.4, 3.35, link_gb=450.0),
    Gpu("H100-PCIe-80", 79.2, 756.0, 2.0, link_gb=64.0),
    Gpu("A100-80", 79.2, 312.0, 2.039, float8=False, link_gb=300.0),
    Gpu("A100-40", 39.4, 312.0, 1.555, float8=False, link_gb=300.0),
    Gpu("L40S", 44.4, 362.0, 0.864),
    Gpu("A6000", 47.4, 154.8, 0.768, float8=False),
    Gpu("L4", 22.0, 121.0, 0.3),
    Gpu("5090-32", 31.4, 209.5, 1.792, link_gb=64.0),
    Gpu("4090-24", 23.5, 165.2, 1.008),
    Gpu("3090-24", 23.6, 71.0, 0.936, float8=False),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _ROWS}
"""GPUs by name."""


@dataclass(frozen=True)
class Calibration:
    """Efficiencies of the parts of a training step, fitted to steps measured on H200s.

    Five with FlashAttention 4 (LoRA of 1B, 2B, 2B with shared prefixes and 8B, 2B full), three with
    FlexAttention (2B with and without dropout, 1B with it) in rows of 16,384 to 18,944 tokens, and
    LoRA and full in rows of 8,192; torch 2.11, benchmarks/train.py and memory.py.
    """

    flex: float = 0.27
    """Rate of FlexAttention with heads of 128 over that of products, forward and backward
    together; narrower heads take as long for fewer FLOPs."""
    flash: float = 0.5
    """The same of FlashAttention 4."""
    attention: float = 0.42
    """The same for torch's fused attention, of the tower and of dense rows."""
    short: float = 64.0
    """Length of sums that take as long as a product's own beginning and end."""
    # More than it costs, 5 ms of 371 in a row of 2B: without dropout the inputs are saved instead,
    # and count as activations.
    dropped_passes: float = 5.2
    """Reads and writes of every value that enters an adapter with dropout, beyond those without."""
    # 1B: kernels run 0.65 s of a step of 0.71 s.
    launch_us: float = 12.0
    """Time that the GPU loses between the kernels of a product and of what follows it, µs."""
    # Rows of 8,192 tokens in 4 and 16 bits: 2B 212 and 182 ms; 1B, bound by the host, 159 and 112.
    unpacking_us: float = 40.0
    """Time that the GPU loses before a product with a quantized weight, µs."""
    unpacking_host_us: float = 330.0
    """Time in which the host starts one, µs."""
    # Fitted to two measured steps: 1.3 to InternVL2-2B's, 1.6 to InternVL2-8B's.
    float8: float = 1.4
    """Rate of float8 products over the bfloat16 rate, quantization included."""
    passes: float = 4.0
    """Reads and writes of every saved activation byte, compiled."""
    uncompiled: float = 2.0
    """Factor of `passes` without the compiler. Assumed: not measured."""
    tower_passes: float = 30.0
    """Reads and writes of a tower block's width, forward."""
    # At its power limit a GPU lowers its clock; kernels were measured in short bursts.
    loop: float = 1.15
    """Time of a step over the sum of its kernels."""
    fill: float = 0.962
    """Share of a packed row's tokens that are not padding, if rows are not known."""
    bus_tb_per_s: float = 0.04
    """Bandwidth between GPU and CPU, TB/s, for offloading. Assumed: not measured."""


CALIBRATION = Calibration()


def update_times(
    trained: float,
    rows: float,
    gpu: Gpu,
    num_gpus: int,
    quantized: float = 0.0,
    *,
    updated: float | None = None,
    offloaded: bool = False,
) -> Iterator[tuple[str, float]]:
    """Yields (purpose, seconds) of the passes over weights, gradients and optimizer states.

    Args:
        trained: number of trained parameters.
        updated: those of a GPU's shard; None: every GPU updates all of them.
        rows: rows of a step over all GPUs; each adds to the gradients.
        quantized: bytes read and written to dequantize weights, per row.
        offloaded: True if the optimizer states are in the CPU's memory.
    """
    updated = trained if updated is None else updated
    copy = gpu.tb_per_s * gpu.copies * 1e12 * num_gpus
    batches = max(rows, num_gpus)
    moved = num_gpus * 40.0 * updated + (18.0 * trained + quantized) * batches
    yield "weights and optimizer", CALIBRATION.loop * moved / copy
    if offloaded:
        yield "moments from the CPU and back", 16.0 * updated / (CALIBRATION.bus_tb_per_s * 1e12)


def find(name: str) -> Gpu:
    """Returns a GPU by name, in any case, with or without memory: "a100-40", "h100".

    Raises:
        UnknownGpu: no such GPU; lists the names of the table.
    """
    plain_name = _plain(name)
    # The first match wins: "h100" is the row with the larger rates, which stands first.
    for gpu in GPUS.values():
        if plain_name in (_plain(gpu.name), _plain(gpu.name.rpartition("-")[0])):
            return gpu
    near = difflib.get_close_matches(plain_name, [_plain(gpu_name) for gpu_name in GPUS], n=1)
    hint = f" (did you mean {next(n for n in GPUS if _plain(n) == near[0])}?)" if near else ""
    raise UnknownGpu(f"GPU {name!r} is not in the table{hint}; known: {', '.join(GPUS)}")


def recognize(reported: str, memory_gib: float) -> Gpu | None:
    """Returns the GPU that a driver reports as ("NVIDIA A100-SXM4-40GB", 39.4), or None."""
    # By memory as well: both A100s share a name.
    named = [g for g in GPUS.values() if _plain(g.name.split("-")[0]) in _plain(reported)]
    near = [g for g in named if abs(g.memory_gib - memory_gib) < 0.1 * g.memory_gib]
    # The PCIe H100 has the SXM one's memory and three quarters of its rate.
    exact = [g for g in near if ("pcie" in _plain(g.name)) == ("pcie" in _plain(reported))]
    return next(iter(exact or near), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace(" ", "").replace("_", "")
