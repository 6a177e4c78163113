# The service alone: onnxruntime and FastAPI, no torch. Built in one stage, copied into another, so that pip and what it
# needs stay behind.
#
#   docker build -t evalmode .
#   docker build -t evalmode:gpu --build-arg ENGINE=gpu --build-arg BASE_IMAGE=<an image with CUDA, cuDNN and python3> .

ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG ENGINE=service
WORKDIR /src
RUN python3 -m venv /opt/evalmode
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY export export
# Byte code is compiled here once, because the running container writes nothing. What goes: pip, the sample data of
# onnx's backend tests, the test suites inside numpy and onnx. Nothing at run time reads them.
RUN /opt/evalmode/bin/pip install --no-cache-dir --quiet --constraint constraints.txt ".[${ENGINE}]" \
    && cd /opt/evalmode/lib/python3*/site-packages \
    && rm -rf pip pip-*.dist-info setuptools setuptools-*.dist-info onnx/backend/test \
    && find numpy onnx -type d -name tests -prune -exec rm -rf {} +

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="evalmode" \
      org.opencontainers.image.description="Serve a network with BatchNorm exactly as it was evaluated." \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/evalmode /opt/evalmode
COPY models /models
ENV PATH=/opt/evalmode/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    EVALMODE_HOST=0.0.0.0 \
    EVALMODE_PORT=8000 \
    EVALMODE_MODELS=/models
# a number, so that Kubernetes can see that it is not root
USER 10001:10001
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python3", "-c", "import os, ssl, urllib.request as u; tls = os.environ.get('EVALMODE_TLS_CERTIFICATE'); u.urlopen(('https' if tls else 'http') + '://127.0.0.1:' + os.environ['EVALMODE_PORT'] + '/v2/health/ready', timeout=2, context=ssl._create_unverified_context() if tls else None)"]
ENTRYPOINT ["evalmode"]
CMD ["serve"]
