#!/bin/sh
# The image's entrypoint. PostgreSQL refuses to run as root, and a container may not make the user
# namespace in which it would: as root (docker run --user root) this becomes the image's plain user,
# to whom the volume then belongs. Where root may not do so, it stays root: enough for DATABASE_URL.
set -eu
if [ "$(id -u)" = 0 ] &&
    find "$DATA_DIR" ! -user messenger -exec chown -h messenger:messenger {} + 2>/dev/null &&
    setpriv --reuid=messenger --regid=messenger --init-groups true 2>/dev/null; then
    export HOME=/nonexistent
    exec setpriv --reuid=messenger --regid=messenger --init-groups "$@"
fi
exec "$@"
