# `camoe serve` in a container: the index and the token are mounted, the videos at the paths that the index knows.
#
#   docker build -t camoe .
#   openssl rand -hex 32 > token
#   docker run -p 7860:7860 -v $PWD/my-index:/index:ro -v $PWD/token:/token:ro -v ~/videos:$HOME/videos:ro camoe
FROM python:3.12-slim

WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY modeling_camoe modeling_camoe
COPY camoe_search camoe_search
RUN pip install --no-cache-dir ".[search]"

RUN useradd --create-home camoe
USER camoe
WORKDIR /home/camoe
EXPOSE 7860
HEALTHCHECK CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/healthz')"]
CMD ["camoe", "serve", "--index", "/index", "--host", "0.0.0.0", "--port", "7860", "--token-file", "/token", "--access-log"]
