# syntax=docker/dockerfile:1.7
# fathom for H100 and H200: CUDA 13.0, torch, Transformer Engine with its torch extension built for exactly this torch.
#   docker build -f infra/docker/cuda.Dockerfile -t fathom:cuda .
# State: its pins are checked by a test; the image itself has not been built or run by the project.
#
# One stage on purpose: TileLang and Triton compile kernels when a run first needs them, so nvcc and a C++ compiler stay.
FROM ghcr.io/astral-sh/uv:0.13.8 AS uv
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# 2.11 is the last that megatron-core 0.16.1 declares (>=2.9,<2.12). Another is a build argument away, and then
# FATHOM_FP8_PARAM_GATHER=on refuses it: ask for on_untried_te, which is recorded.
ARG TORCH_VERSION=2.13.0
ARG TE_VERSION=2.11.0
ARG MAX_JOBS=8

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ git \
    && rm -rf /var/lib/apt/lists/*

COPY --from=uv /uv /usr/local/bin/uv
ENV VIRTUAL_ENV=/opt/venv \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PYTHON_INSTALL_DIR=/opt/python \
    PATH=/opt/venv/bin:$PATH
RUN uv venv --python 3.11 /opt/venv

# torch brings cuDNN, NCCL and cuBLAS as packages; one_torch keeps everything later from replacing it.
RUN echo "torch==$TORCH_VERSION" >/opt/one_torch.txt
ENV UV_CONSTRAINT=/opt/one_torch.txt
RUN uv pip install "torch==$TORCH_VERSION" \
    "setuptools==80.10.0" "wheel==0.46.3" "pybind11==3.0.4" "ninja==1.13.2" "packaging>=25"

# The extension is compiled here, not fetched: a GPU machine may have no network, and a wheel made for another torch
# fails when it is imported. Its headers are those of the cuDNN and NCCL that torch will load.
ENV NVIDIA_PACKAGES=/opt/venv/lib/python3.11/site-packages/nvidia
RUN uv pip install "transformer_engine_cu13==$TE_VERSION" "transformer_engine==$TE_VERSION"
RUN CUDNN_PATH="$NVIDIA_PACKAGES/cudnn" \
    CPATH="$NVIDIA_PACKAGES/cudnn/include:$NVIDIA_PACKAGES/nccl/include" \
    NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_CUDA_ARCHS=90 MAX_JOBS="$MAX_JOBS" \
    uv pip install --no-build-isolation --no-binary transformer_engine_torch "transformer_engine_torch==$TE_VERSION"

WORKDIR /opt/fathom
COPY pyproject.toml README.md LICENSE ./
COPY apps apps
COPY libs libs
COPY infra infra
RUN uv pip install --editable '.[cuda]' && uv pip freeze >/opt/packages.txt

# What can be checked without a GPU: nothing replaced torch, the three parts of TE are one version, the extension is there.
RUN python - <<'PYTHON'
import importlib.metadata, importlib.util, os, pathlib

wanted = pathlib.Path("/opt/one_torch.txt").read_text().strip().partition("==")[2]
assert importlib.metadata.version("torch").partition("+")[0] == wanted, importlib.metadata.version("torch")
parts = ("transformer_engine", "transformer_engine_cu13", "transformer_engine_torch")
assert len({importlib.metadata.version(part) for part in parts}) == 1
assert importlib.util.find_spec("transformer_engine_torch") is not None
PYTHON

# Nobody writes into the image: runs and data are mounted (see infra/launch).
ENTRYPOINT []
CMD ["fathom", "--help"]
