# The package comes onto the machine, and nothing happens yet.
# shellcheck shell=bash disable=SC2154,SC2016

prepare
arrange 'listing >/root/before; getent passwd >/root/users'
ok 'installs' install || return 9
ok 'its files are as it brought them' verify
ok 'it brings no configuration, which is the administrator'"'"'s, but an example of it' inside '
    test -d /etc/we-agent && test -z "$(ls -A /etc/we-agent)" && grep -q "^#startup:" /usr/share/doc/we-agent/we-agent.yaml'
ok 'its users are there, without a shell or a home' inside '
    for user in we-agent we-agent-exec; do
        home=$(getent passwd $user | cut -d: -f6)
        getent passwd $user | grep -E ":(/usr)?/s?bin/nologin$" && { test ! -e "$home/." || test "$home" = /; } || exit 1
    done'
ok 'it does not run and is not enabled' inside '
    test "$(systemctl is-active we-agent)/$(systemctl is-enabled we-agent)" = inactive/disabled &&
        ! systemctl list-units --all --plain --no-legend "we-agent*" | grep -w active &&
        ! find /etc/systemd -name "*we-agent*" | grep .'
# As the first boot does it (systemd.preset(5)); Debian enables what no preset names.
ok 'the first boot of an image enables nothing of it' inside '
    mkdir -p /root/image/usr/lib && cp -a /usr/lib/systemd /root/image/usr/lib &&
        printf "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n" >/root/image/usr/lib/systemd/system/other.service &&
        { systemctl --root=/root/image preset-all || :; } && find /root/image/etc -name other.service | grep . &&
        ! find /root/image/etc -name "*we-agent*" | grep .'
arrange 'rm -r /root/image'
ok 'all its files are root'"'"'s, none is setuid or can be written by others' inside '
    { dpkg -L we-agent 2>/dev/null || rpm -ql we-agent; } | while read -r path; do
        case $path in /run/*) continue ;; esac
        find "$path" -maxdepth 0 \( -not -user root -o -not -group root -o -perm /6000 -o -not -type l -perm /022 \) -ls
    done | grep . && exit 1 || exit 0'
ok 'the manual page and the licence are there' inside '
    zcat /usr/share/man/man8/we-agent.8.gz | grep -q "^.TH we-agent" &&
        ls /usr/share/doc/we-agent/copyright /usr/share/licenses/we-agent/LICENSE 2>/dev/null | grep .'
ok 'the program says its version' inside 'we-agent --version'
if systemd_is 250; then
    ok 'every unit verifies' inside '
        for unit in $(cd /usr/lib/systemd/system && echo we-agent* | tr " " "\n" | sed "s/@\./@payments./"); do
            systemd-analyze verify --man=no --recursive-errors=one "$unit" || exit 1
        done'
    ok 'exposure of the running configuration is at most 1.2' inside '
        systemd-analyze security --threshold=12 --no-pager we-agent.service | tail -1; test "${PIPESTATUS[0]}" = 0'
    ok 'and that of what root does for it at most 1.4' inside '
        systemd-analyze security --threshold=14 --no-pager we-agent-permit.service | tail -1; test "${PIPESTATUS[0]}" = 0'
else
    skip 'systemd-analyze verify and security' "systemd $systemd has no --recursive-errors and --threshold"
fi
