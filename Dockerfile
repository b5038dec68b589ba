FROM python:3.13-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONWARNINGS=ignore \
    HOST=0.0.0.0 \
    PORT=8080 \
    DATA_DIR=/data

RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent messenger \
    && install --directory --owner=messenger --group=messenger --mode=0700 /data

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --root-user-action=ignore --require-hashes -r requirements.txt

# .dockerignore says what there is to copy.
COPY . .

USER messenger
# Used without DATABASE_URL only: the embedded PostgreSQL keeps everything here.
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "\
import os, urllib.request; \
urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/api/v1/health/readiness', timeout=4)"]
ENTRYPOINT ["sh", "deploy/container.sh"]
CMD ["python", "messenger.py"]
