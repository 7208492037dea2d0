"""vLLM's Model Runner V2 and CUDA graphs, emulated on a CPU.

`tests.emulated.plugin` prepares a process for it; `tests/test_emulated.py` starts that process.

| module | emulates |
|---|---|
| `triton_cpu` | a Triton backend for CPUs, by Triton's interpreter: vLLM's V2 runner then runs |
| `graphs` | CUDA graphs: record, replay, and what a capture forbids |
| `platform` | a platform with graph modes and Triton attention, as CUDA's |

It proves the bookkeeping: what the runner calls, what a graph freezes, which memory it reads. It
proves nothing about time, races between threads or streams, rounding of compiled kernels, or
attention backends that need CUDA.
"""
