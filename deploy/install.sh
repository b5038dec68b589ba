#!/bin/sh
# Makes a fresh Debian (12 or later) a server of the messenger, behind Caddy with TLS:
#
#     sudo sh deploy/install.sh chat.example.com
#
# Run again from a newer copy, it installs that and restarts the server; the settings in
# /etc/messenger.env, the data in /var/lib/messenger and Caddy's file stay as they are.
set -eu
umask 022

die() {
    echo "install.sh: $*" >&2
    exit 1
}

[ $# = 1 ] || die "usage: sh deploy/install.sh DOMAIN"
case $1 in
'' | *[!A-Za-z0-9.-]*) die "$1 is not the name of a host" ;;
esac
[ "$(id -u)" = 0 ] || die "needs root"
source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
code=/opt/messenger
site=/etc/caddy/Caddyfile

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends python3-venv ca-certificates caddy >/dev/null

id messenger >/dev/null 2>&1 ||
    useradd --system --user-group --home-dir /nonexistent --shell /usr/sbin/nologin messenger

# The code and what it depends on belong to root: the server cannot change what it runs.
mkdir -p "$code"
for part in run messenger.py requirements.txt plumbing sql tools web deploy; do
    [ "$source" = "$code" ] || { rm -rf "${code:?}/$part" && cp -R "$source/$part" "$code"; }
done
chown -R root:root "$code"
"$code/run" install

[ -e /etc/messenger.env ] || install -m 0600 "$code/deploy/messenger.env" /etc/messenger.env
install -m 0644 "$code/deploy/messenger.service" /etc/systemd/system/messenger.service

# Debian's own Caddyfile serves a page that says so; it is kept beside ours.
if ! grep -q '127\.0\.0\.1:8080' "$site"; then
    mv "$site" "$site.before"
    sed "s/chat\.example\.com/$1/" "$code/deploy/Caddyfile" >"$site"
fi

systemctl enable --quiet messenger caddy
sync # a power cut now must not leave half of it
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl restart messenger
    systemctl reload-or-restart caddy
    echo "The messenger serves https://$1 once the name leads here; its log: journalctl -u messenger"
else
    echo "The messenger will serve https://$1 from the next start of this machine on."
fi
