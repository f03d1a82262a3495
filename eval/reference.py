"""Holds the numbers that the reference has published, about its four training runs and about its model's answers."""

from dataclasses import dataclass

STAGES = ("reference-stage0", "reference-stage1", "reference-stage2_offload", "reference-stage3_offload")
STAGE0, STAGE1, STAGE2, STAGE3 = STAGES


@dataclass(frozen=True)
class Published:
    """Holds what the reference says about one of its training runs."""

    wall_seconds: float
    cpu_percent: float  # mean CPU use of the machine
    process_mb: tuple[int, int]  # memory of the two processes, as the reference writes it


# The reference trained Qwen2.5-14B-Instruct on two 32 GB GPUs. The pages show its MB beside our MB of 10^6 bytes, but
# the reference must mean 2^20 bytes: 14.77e9 weights in bf16 take 28,171 of those.
PUBLISHED = {
    STAGE0: Published(114.0, 7.6, (2431, 28623)),
    STAGE1: Published(112.0, 8.5, (2421, 27810)),
    STAGE2: Published(114.0, 9.0, (2679, 25693)),
    STAGE3: Published(720.0, 11.5, (27213, 49028)),
}
# The reference asked its model 20 prompts, one at a time.
PUBLISHED_ANSWERS = {
    "base": {"accuracy": 0.0, "seconds": 19.67, "tokens_per_second": 20.3, "peak_load_bytes": 28_317.6e6,
             "peak_inference_bytes": 24.6e6},
    "tuned": {"accuracy": 1.0, "seconds": 29.60, "tokens_per_second": 12.1, "peak_load_bytes": 28_448.9e6,
              "peak_inference_bytes": 24.2e6},
}  # fmt: skip
