#!/usr/bin/env bash
# The tests with the arithmetic of two older kinds of x86 CPU: AVX2 without AVX-512, then SSE4. Run scripts/check.sh first, which sets
# up .venv. Arguments go to pytest. torch, oneDNN, MKL, numpy and OpenBLAS are told so; onnxruntime takes what the CPU has.
set -euo pipefail
cd "$(dirname "$0")/.."
avx512="AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V4"

echo "as a CPU with AVX2"
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
    NPY_DISABLE_CPU_FEATURES="$avx512" \
    .venv/bin/python -m pytest -n auto "$@"

echo "as a CPU with SSE4"
ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OPENBLAS_CORETYPE=Nehalem \
    NPY_DISABLE_CPU_FEATURES="$avx512 AVX2 FMA3 X86_V3" \
    .venv/bin/python -m pytest -n auto "$@"
