#!/usr/bin/env bash
# root.sh SUITE: builds the root of a machine with this Debian release, once, and prints where it is.
#
# It is Debian's own systemd and dpkg, with rpm beside them, from the package sources of this machine. Every test machine has
# it read-only below an overlay. Remove the directory to have a newer one.
set -euo pipefail

suite=$1
cache=${WE_AGENT_BED:-$(dirname "$0")/../../target/bed}
mkdir -p "$cache"
cache=$(readlink -f "$cache")
# What is in a root is told by its name: another recipe is another root.
recipe=1
packages=systemd,systemd-sysv,dbus,procps,iproute2,openssl,busybox-static,rpm
root=$cache/$suite-$recipe

# Two tests of one release begin at the same time.
exec 9>"$cache/$suite.lock"
flock 9
[[ ! -e $root ]] || { echo "$root"; exit; }

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

# Debian's own entries for the release that this machine runs, with the wanted one in its place.
here=$(. /etc/os-release && echo "$VERSION_CODENAME")
sources=()
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources}; do
    # Not the repository of another program, which can have a release of the same name in its own.
    if [[ -f $file ]] && grep -qE "^(Suites:|deb ).*[ /]$here(-updates|-security)?( |$)" "$file"; then
        sources+=("$work/${#sources[@]}.${file##*.}")
        sed "s/\<$here\>/$suite/g" "$file" >"${sources[-1]}"
    fi
done
[[ ${#sources[@]} -gt 0 ]] || { echo "root.sh: no package source of Debian $here here" >&2; exit 1; }

cat >"$work/customize" <<'IN'
#!/bin/sh
set -e
cd "$1"
# Only this build is without documentation: what the package brings must be installed.
rm -f etc/dpkg/dpkg.cfg.d/99mmdebstrap etc/apt/apt.conf.d/99mmdebstrap usr/sbin/policy-rc.d
# A machine has no network.
rm -rf etc/apt/sources.list etc/apt/sources.list.d/* var/lib/apt/lists/* var/cache/apt/*.bin
# Not empty: that would be a first boot, and a first boot enables what its preset says.
echo 0123456789abcdef0123456789abcdef >etc/machine-id
echo machine >etc/hostname
echo '127.0.0.1 localhost machine' >etc/hosts
# Nothing that wakes up by itself or waits for a terminal.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer \
    e2scrub_reap.service systemd-timesyncd.service getty@tty1.service console-getty.service; do
    ln -sf /dev/null "etc/systemd/system/$unit"
done
# A journal that lasts over a reboot and drops nothing.
mkdir -p var/log/journal etc/systemd/journald.conf.d
printf '[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n' >etc/systemd/journald.conf.d/machine.conf
chroot . rpmdb --initdb
IN
chmod +x "$work/customize"

echo "building the root of $suite" >&2
# The dates of an old release's index have run out; its signatures are checked.
if ! TMPDIR=$work timeout -k 10 600 mmdebstrap --quiet --mode=root --variant=apt --format=directory --include="$packages" \
    --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Languages "none"' \
    --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --customize-hook="$work/customize \"\$1\"" \
    "$suite" "$work/root" "${sources[@]}" </dev/null >"$work/log" 2>&1 9>&-; then
    tail -20 "$work/log" >&2
    exit 1
fi
chmod 755 "$work/root"
mv "$work/root" "$root"
echo "$root"
