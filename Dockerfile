# The commands of this project on NVIDIA's PyTorch image: `shards`, and `python /opt/googlenet-dali/train.py`.
# docs/getting-started.md shows how to build and run it.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/googlenet-dali

# The image's own torch stays: it is left out of the dependencies, and compared at the end. The image pins DALI and other
# packages in a file that PIP_CONSTRAINT names, so that is empty here. Both builds of DALI provide `nvidia.dali`, so those
# that are there go before the one for the image's CUDA 13 comes.
COPY pyproject.toml ./
ARG DALI=nvidia-dali-cuda130==2.4.0
RUN python -c 'import torch; print(torch.__version__)' > /tmp/torch \
    && python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        | grep -v -E '^(torch|nvidia-dali)' > /tmp/dependencies \
    && python -m pip uninstall --yes nvidia-dali-cuda120 nvidia-dali-cuda130 \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir "${DALI}" --requirement /tmp/dependencies \
    && python -c 'import torch, nvidia.dali; print(torch.__version__)' | diff /tmp/torch - \
    && rm /tmp/torch /tmp/dependencies

COPY README.md LICENSE googlenet_dali.py train.py ./
COPY model model
COPY pipelines pipelines
COPY tools tools
RUN PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps --editable .

# With `docker run --user` there is no home folder and no user name, and torch.compile needs both.
ENV HOME=/tmp USER=user
WORKDIR /work
