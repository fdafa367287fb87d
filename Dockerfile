# The page and the server on CPUs, with the small model; no other weights inside. See docs/install.md.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

# What changes least comes first: PyTorch, then the other packages, then the code.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" torch==2.13.0
COPY requirements.txt requirements-serve.txt ./
RUN pip install -r requirements.txt
RUN pip install --no-deps -r requirements-serve.txt
COPY setup.py pyproject.toml LICENSE ./
COPY configs configs
COPY assets assets
COPY opensora opensora
RUN pip install --no-deps .

RUN useradd --create-home --uid 1000 opensora && install -d -o opensora -g opensora /data
USER opensora
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["opensora"]
CMD ["serve", "demo", "--host", "0.0.0.0", "--data-dir", "/data/serving", "--api-key-file", "/run/secrets/api_key"]
