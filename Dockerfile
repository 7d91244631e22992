# docker build -t joint-slots .
# docker run --rm -it --gpus all --shm-size 8g -v /path/to/data:/data -v "$PWD/checkpoints:/work/checkpoints" joint-slots
#
# --shm-size: batches of data-loading workers travel through /dev/shm, of which Docker gives 64 MB; a run that needs more
# says how much. PyTorch brings its own CUDA libraries, so the base image only needs to say which driver they want.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        git libgl1 libglib2.0-0 make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# --build-arg EXTRAS="requirements-shards.txt requirements-timm.txt" adds what only some need
ARG EXTRAS=""
COPY requirements*.txt /tmp/requirements/
RUN python3 -m venv /opt/venv \
    && cd /tmp/requirements \
    && for file in requirements.txt ${EXTRAS}; do /opt/venv/bin/pip install --no-cache-dir -r "$file" || exit 1; done \
    && rm -rf /tmp/requirements

# not root; --user "$(id -u):$(id -g)" works as well, as nothing is written but into mounted folders and CACHE_ROOT
RUN useradd --uid 10001 --create-home user && install -d -o user /work
COPY --chown=user . /work
WORKDIR /work
ENV PATH=/opt/venv/bin:$PATH \
    CACHE_ROOT=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCH_HOME=/tmp/torch \
    GOMP_SPINCOUNT=1000 \
    GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=/work
USER user
CMD ["bash"]
