#!/bin/bash
# Sees to it that every command in tests/packages.txt is here: installs the missing packages when root, else
# names them and fails. `--soak` asks for those of tests/packages-soak.txt too, `--bench` for those of tests/packages-bench.txt; `--list` prints what is missing and changes nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
lists=("$here/packages.txt") list=
for option; do
    case $option in
    --soak | --bench) lists+=("$here/packages-${option#--}.txt") ;;
    --list) list=1 ;;
    *) echo "usage: $0 [--soak] [--bench] [--list]" >&2; exit 2 ;;
    esac
done
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing() {
    local need package
    while read -r need package; do
        case $need in
        '' | '#'*) continue ;;
        python3:*) /usr/bin/python3 -c "import ${need#python3:}" 2>/dev/null && continue ;;
        /*) [ -e "$need" ] && continue ;;
        *) type -P "$need" >/dev/null && continue ;;
        esac
        echo "$package"
    done < <(cat "${lists[@]}") | sort -u
}

packages=$(missing)
[ -z "$list" ] || { printf '%s\n' "$packages"; exit 0; }
if [ -n "$packages" ]; then
    packages=${packages//$'\n'/ }
    if [ "$(id -u)" != 0 ]; then
        echo "missing Debian packages: $packages" >&2
        echo "hint: sudo apt-get install --no-install-recommends $packages" >&2
        exit 1
    fi
    echo "installing missing Debian packages: $packages"
    export DEBIAN_FRONTEND=noninteractive
    # RUNLEVEL=1 keeps maintainer scripts from starting a database or an NBD server on this machine.
    # shellcheck disable=SC2086
    { RUNLEVEL=1 apt-get install -y --no-install-recommends $packages ||
        { apt-get update && RUNLEVEL=1 apt-get install -y --no-install-recommends $packages; }; } >/tmp/horcrux-apt.$$ 2>&1 ||
        { tail -30 /tmp/horcrux-apt.$$ >&2; rm -f /tmp/horcrux-apt.$$; exit 1; }
    rm -f /tmp/horcrux-apt.$$
    packages=$(missing)
    [ -z "$packages" ] || { echo "still missing after installing: ${packages//$'\n'/ }" >&2; exit 1; }
fi
echo "packages: all there" >&2
