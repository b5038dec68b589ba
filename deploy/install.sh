#!/bin/sh
# Makes a fresh Debian (12 or later) a server of the messenger, behind Caddy with TLS:
#
#     sudo sh deploy/install.sh chat.example.com
#     sudo sh deploy/install.sh --no-caddy          # where you have a proxy of your own
#
# Run again from a newer copy, it installs that and restarts the server, unless somebody had stopped
# it; the settings in /etc/messenger.env, the data in /var/lib/messenger and Caddy's file stay as
# they are.
set -eu
umask 022

die() {
    echo "install.sh: $*" >&2
    exit 1
}

[ $# = 1 ] || die "usage: sh deploy/install.sh DOMAIN, or --no-caddy"
domain=$1
packages="python3-venv ca-certificates caddy"
case $1 in
--no-caddy)
    domain=
    packages="python3-venv ca-certificates"
    ;;
'' | -* | *[!A-Za-z0-9.-]*) die "$1 is not the name of a host" ;;
esac
[ "$(id -u)" = 0 ] || die "needs root"
source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
code=/opt/messenger
site=/etc/caddy/Caddyfile
units=/etc/systemd/system

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 # several names
apt-get install -qq -y --no-install-recommends $packages >/dev/null

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
chmod go-rwx /etc/messenger.env # it may have a password, and whoever made it may have used cp

was_stopped=
if [ -e "$units/messenger.service" ] && [ -d /run/systemd/system ] &&
    [ "$(systemctl show --value -p ActiveState messenger)" = inactive ]; then
    was_stopped=yes
fi
for unit in messenger.service messenger-backup.service messenger-backup.timer; do
    install -m 0644 "$code/deploy/$unit" "$units/$unit"
done
systemctl enable --quiet messenger

where="127.0.0.1:8080, for your proxy"
if [ -n "$domain" ]; then
    # What was there, at first Debian's own page of welcome, is kept beside ours.
    if ! grep -q '127\.0\.0\.1:8080' "$site"; then
        mv "$site" "$site.before"
        sed "s/chat\.example\.com/$domain/" "$code/deploy/Caddyfile" >"$site"
    fi
    systemctl enable --quiet caddy
    where="https://$domain once the name leads here"
    if ! grep -q "^$domain {" "$site"; then
        where="the names in $site, where $domain is none"
    fi
fi

sync # a power cut now must not leave half of it
if [ ! -d /run/systemd/system ]; then
    echo "From the next start of this machine on the messenger serves $where"
    exit
fi
systemctl daemon-reload
[ -z "$domain" ] || systemctl reload-or-restart caddy
if [ -n "$was_stopped" ]; then
    echo "The messenger is installed, and stays stopped: systemctl start messenger"
else
    systemctl restart messenger
    echo "The messenger serves $where; its log: journalctl -u messenger"
fi
