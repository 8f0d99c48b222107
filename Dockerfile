# The embedding service. The library and what it serves with are installed; training is not.
#
#   docker build -t vaefeat .                                  CPU
#   docker build -t vaefeat:cuda --build-arg ACCELERATOR=cuda . CUDA 13; run it with --gpus all
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/digits:/bundle:ro" vaefeat /bundle --host 0.0.0.0 --insecure
#
# Inside a container the service must listen on all of the container's addresses for a published port to reach it, and
# says so with --host and --insecure; publish the port on the host's loopback, as above, or put a proxy in front.
#
# On Kubernetes KubeRay starts Ray in it, in place of the entry point: serving/deploy/rayservice.yaml.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG ACCELERATOR=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
RUN pip install --no-cache-dir uv
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY vaefeat vaefeat
# The lock holds exact versions and hashes of everything; as a constraint it pins what the service needs of it.
# On a GPU, CUDA's libraries come as wheels: no CUDA base image is needed. cuBLAS is not among ONNX Runtime's extras.
RUN uv venv /opt/vaefeat \
 && uv pip install --python /opt/vaefeat/bin/python --no-cache --constraints requirements.lock ".[serve]" \
 && case "${ACCELERATOR}" in \
      cpu) ;; \
      cuda) uv pip install --python /opt/vaefeat/bin/python --no-cache --constraints requirements.lock \
              "onnxruntime-gpu[cuda,cudnn]" nvidia-cublas ;; \
      *) echo "ACCELERATOR=${ACCELERATOR} is neither cpu nor cuda" >&2; exit 1 ;; \
    esac

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 10001 vaefeat
COPY --from=build /opt/vaefeat /opt/vaefeat
WORKDIR /app
COPY serving serving
# On a cluster, Ray's processes look for serving.cluster from folders of their own.
ENV PATH=/opt/vaefeat/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER vaefeat
EXPOSE 8000
# Ray Serve takes about 20 s to start. With another --port give --health-cmd, too.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# SIGINT is how the service is stopped in order, with nothing of Ray left behind.
STOPSIGNAL SIGINT
ENTRYPOINT ["python", "-m", "serving"]
