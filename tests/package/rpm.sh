# What an administrator of Red Hat's family types. Sourced by life.sh.
# shellcheck shell=bash disable=SC2034,SC2154

install() { inside "rpm -i $package"; }
upgrade() { inside "rpm -U $next"; }
downgrade() { inside "rpm -U --oldpackage $package"; }
remove() { inside 'rpm -e we-agent'; }
# There is no purge: what the administrator has put there is the administrator's to remove.
purge() { inside 'rm -rf /etc/we-agent /var/lib/we-agent'; }
verify() { inside '! rpm -V we-agent | grep .'; }
contents() { inside 'rpm -ql we-agent'; }

# Debian's root says nothing to rpm of what it has. A package without files says it, in the names of Red Hat's family;
# with --nodeps a wrong dependency would not be seen.
prepare() {
    cat >"$out/provides.yaml" <<'YAML'
name: provides
arch: noarch
version: 1.0.0
release: "1"
maintainer: nobody
license: none
description: what this root has, in the names of an rpm distribution
provides: [/bin/sh, systemd = 247, "libc.so.6(GLIBC_2.28)(64bit)"]
YAML
    (cd "$out" && "$NFPM" package --config provides.yaml --packager rpm --target provides.rpm) >/dev/null &&
        machine push "$out/provides.rpm" /root
    rm -f "$out"/provides.*
    ok 'rpm refuses the package while what it depends on is missing' inside "! rpm -i $package"
    ok 'and takes what it depends on' inside 'rpm -i /root/provides.rpm'
    # There they are of the package "filesystem".
    arrange 'mkdir -p /usr/lib/systemd/system{,-preset} /usr/share/{licenses,man/man{5,8},zsh/site-functions,fish/vendor_completions.d,bash-completion/completions}'
    # Red Hat's policy: nothing is enabled unless a preset says so.
    arrange 'mkdir -p /etc/systemd/system-preset && echo "disable *" >/etc/systemd/system-preset/99-default-disable.preset'
}
