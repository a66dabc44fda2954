# The package goes, and the machine is as it was.
# shellcheck shell=bash disable=SC2154,SC2016

ok 'no unit of the machine has failed on the way' inside '! systemctl --failed --plain --no-legend | grep .'
# Of somebody else, and named like ours.
arrange '
    printf "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n" >/etc/systemd/system/we-agent-dashboard.service
    systemctl daemon-reload; systemctl enable --now we-agent-dashboard'
# A masked unit is one that systemctl does not disable; the mask itself is the administrator's.
arrange 'systemctl mask we-agent; ls /etc/systemd/system/*.wants/we-agent.service'
ok 'is removed, though it is masked and enabled' remove
arrange 'rm /etc/systemd/system/we-agent.service'
ok 'nothing of it runs' inside '
    ! systemctl list-units --plain --no-legend "we-agent*" | grep -v ^we-agent-dashboard | grep -w active &&
        ! grep -l "^Name:.we-agent" /proc/[0-9]*/status 2>/dev/null | grep .'
ok 'what only has a name like its own goes on' inside '
    systemctl --quiet is-active we-agent-dashboard && systemctl --quiet is-enabled we-agent-dashboard'
ok 'what it published is gone' inside '! ls -d /run/we-agent* 2>/dev/null | grep .'
ok 'bundles and configuration stay until the purge' inside '
    ls /etc/we-agent/payments/cluster.env /var/lib/we-agent && ls /etc/we-agent/we-agent.yaml*'
ok 'is purged' purge
# What the checks themselves have put there.
arrange '
    systemctl disable --now server we-agent-dashboard; systemctl reset-failed
    rm -rf /etc/systemd/system/{server.service,we-agent-dashboard.service,we-agent-socket@.socket.d} /srv/app /home/somebody \
        /usr/local/lib/attempts /usr/local/bin/{batch-probe,hook,consumer} /var/tmp/{batch-probe,hook,given}'
ok 'the file system is as it was' inside '
    listing >/root/after
    # The users stay, for their numbers must not become somebody else'"'"'s; with them the backups of their files.
    diff /root/before /root/after | grep "^[<>]" | grep -vE " /etc/((passwd|group|shadow|gshadow|subuid|subgid)-?|.pwd.lock) *$" && exit 1 || exit 0'
ok 'all that stays are two users' inside '
    getent passwd | diff /root/users - | grep "^[<>]" && test "$(getent passwd | diff /root/users - | grep -c "^> we-agent")" = 2'
