#!/bin/sh
# Chromium and its driver, for the tests of the page: Debian's packages, installed where they are not there yet.
set -eu
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0

packages="chromium chromium-driver"
give_up() {
    echo "the tests of the page need a browser that is not here; $1. On Debian, as root: apt-get install $packages" >&2
    exit 1
}
command -v apt-get >/dev/null || give_up "there is no apt-get"
root=""
if [ "$(id -u)" != 0 ]; then
    root="sudo -n"
    $root true 2>/dev/null || give_up "only root may install it"
fi
# shellcheck disable=SC2086  # words each
install() {
    $root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends $packages >/dev/null 2>&1
}
if ! install; then
    $root apt-get update -qq || give_up "apt-get cannot fetch its lists"
    install || give_up "apt-get cannot install it"
fi
