# Two images from one file. `serve` is the service, and has no torch; `full` also trains, and by itself runs the demo.
#
#   docker build -t vaefeat .                                    CPU; the service is what is built when nothing is said
#   docker build -t vaefeat:full --target full .                 CPU
#   docker build -t vaefeat:cuda --build-arg ACCELERATOR=cuda .  CUDA 13; run it with --gpus all
#
# docs/docker.md says how to run them, how large they are, and what to do where PyTorch's index is out of reach.

ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG ACCELERATOR=cpu
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1
RUN python -m venv /opt/uv \
 && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check uv==0.13.8 \
 && /opt/uv/bin/uv venv --python "$(command -v python)" /opt/vaefeat
ENV PATH=/opt/uv/bin:$PATH VIRTUAL_ENV=/opt/vaefeat
WORKDIR /src
COPY pyproject.toml requirements.lock ./
# The lock, as constraints, pins versions and hashes of what an image needs of it.
# cpu: the base install asks for onnxruntime-gpu on this platform; the lock has onnxruntime for the others, which is a
# fifth of the size. cuda: CUDA's libraries come as wheels; cuBLAS is not among ONNX Runtime's extras.
RUN case "${ACCELERATOR}" in \
      cpu) sed '/^onnxruntime==/s/ ;.*/ \\/' requirements.lock > constraints.txt \
        && echo onnxruntime > accelerator.txt \
        && echo "onnxruntime-gpu; python_version < '3'" > overrides.txt ;; \
      cuda) cp requirements.lock constraints.txt \
        && printf '%s\n' 'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas > accelerator.txt \
        && touch overrides.txt ;; \
      *) echo "ACCELERATOR=${ACCELERATOR} is neither cpu nor cuda" >&2; exit 1 ;; \
    esac

FROM build AS build-serve
RUN uv pip install --constraints constraints.txt --overrides overrides.txt \
      --requirements accelerator.txt --requirements pyproject.toml --extra serve
# Apart from what it needs, so that new code is a small layer.
COPY README.md LICENSE ./
COPY vaefeat vaefeat
COPY serving /app/serving
RUN uv pip install --no-deps --target /app . && python -m compileall -q /app

FROM build AS build-full
ARG ACCELERATOR=cpu
# cpu: a requirement for torch that the configured indexes meet with a CPU build, such as torch==2.13.0+cpu. Without it,
# the lock's version from PyTorch's own index, which uv knows. Either has other hashes than the lock's build for CUDA.
ARG TORCH
RUN if [ "${ACCELERATOR}" = cpu ]; then \
      pinned=$(grep -o '^torch==[^ ]*' constraints.txt); \
      sed -i '/^torch==/,/[^\\]$/d' constraints.txt; \
      echo "${TORCH:-${pinned}}" >> accelerator.txt; \
      [ -n "${TORCH}" ] || export UV_TORCH_BACKEND=cpu; \
    fi \
 && uv pip install --constraints constraints.txt --overrides overrides.txt \
      --requirements accelerator.txt --requirements pyproject.toml --extra serve --extra jobs
# 400 MB that nothing here reads: tests, headers for a compiler that is not there, Ray for Java.
RUN find /opt/vaefeat/lib \( -type d -name tests -o -path '*/torch/test' -o -path '*/torch/bin/test_*' \
      -o -path '*/torch/include' -o -path '*/ray/jars' \) -prune -exec rm -rf {} +
COPY README.md LICENSE ./
COPY vaefeat vaefeat
COPY serving /app/serving
COPY pipelines /app/pipelines
RUN uv pip install --no-deps --target /app . && python -m compileall -q /app

FROM ${BASE} AS runtime
ARG REVISION=unknown
LABEL org.opencontainers.image.title=vaefeat \
      org.opencontainers.image.description="Features from variational auto-encoders, over HTTP" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.revision=${REVISION}
# Ray and matplotlib write to the home; with a read-only root /tmp is the one place for that. Jobs write to /runs: a volume
# that is made new there takes on its owner.
RUN useradd --uid 10001 --home-dir /tmp --no-create-home vaefeat && install --directory --owner=10001 --group=10001 /runs
# On a cluster, Ray's processes look for serving.cluster from folders of their own. ONNX Runtime's builds report to their
# makers, and so does Ray; neither happens here.
ENV PATH=/opt/vaefeat/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0
# By number, so that Kubernetes' runAsNonRoot can see that it is not root.
USER 10001:10001

FROM runtime AS full
COPY --from=build-full /opt/vaefeat /opt/vaefeat
COPY --from=build-full /app /app
WORKDIR /app
# Python obeys SIGINT even as process 1, which SIGTERM does not reach without a handler.
STOPSIGNAL SIGINT
ENTRYPOINT ["python", "-m", "pipelines"]
CMD ["run", "pipelines/configs/digits.toml", "--set", "out=/runs/digits"]

FROM runtime AS serve
COPY --from=build-serve /opt/vaefeat /opt/vaefeat
COPY --from=build-serve /app /app
WORKDIR /app
EXPOSE 8000
# Ray Serve takes about 20 s to start. With another --port give --health-cmd, too.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "serving"]
