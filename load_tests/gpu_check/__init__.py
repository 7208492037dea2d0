"""Checks kernels, graphs and a steered engine on an NVIDIA GPU: `docs/reports/gpu-check.md`.

    python -m load_tests.gpu_check --out gpu-check.json

Sections A to F need PyTorch, Triton, NumPy and this repository; G and H need vLLM too. Without a
GPU, A to F run small in Triton's interpreter, with emulated graphs: a rehearsal.
"""
