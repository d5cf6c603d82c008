#!/bin/sh
# Programs that the tests of deploy/ run. What this machine lacks is unpacked from Debian's packages into the given folder, and
# linked into its bin/: nothing is installed, no service is started, and no root is needed but to fetch the lists of packages.
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
PATH="$folder/bin:$PATH:/usr/sbin"
programs="nginx:nginx caddy:caddy promtool:prometheus openssl:openssl"

missing=""
for each in $programs; do
    command -v "${each%%:*}" >/dev/null || missing="$missing ${each#*:}"
done
[ -n "$missing" ] || exit 0

give_up() {
    echo "tests of deploy/ need programs that are not here; $1. On Debian: apt-get install$missing" >&2
    exit 1
}

command -v apt-get >/dev/null || give_up "there is no apt-get"
mkdir -p "$folder/debian" "$folder/bin"
cd "$folder/debian"
# shellcheck disable=SC2086  # one word each
if ! apt-get download -qq $missing 2>/dev/null; then
    [ "$(id -u)" = 0 ] || give_up "apt-get knows no packages (apt-get update)"
    apt-get update -qq
    apt-get download -qq $missing || give_up "apt-get cannot download them"
fi
for package in ./*.deb; do
    dpkg-deb -x "$package" .
    rm "$package"
done
rm -rf usr/share usr/bin/prometheus
for each in $programs; do
    program=${each%%:*}
    for there in usr/sbin usr/bin; do
        [ ! -x "$there/$program" ] || ln -sf "../debian/$there/$program" "$folder/bin/$program"
    done
    command -v "$program" >/dev/null || give_up "$program was not in its package"
done
