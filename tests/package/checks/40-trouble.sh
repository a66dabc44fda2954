# The process dies, hangs, and is configured wrongly.
# shellcheck shell=bash disable=SC2154,SC2016

arrange consumers_start
ok 'comes back after kill -9' inside 'pid=$(p MainPID); kill -KILL $pid; within 20 another $pid'
ok 'and is ready' inside 'within 20 ready'
ok 'and rotates' rotates
ok 'consumers of socket and files saw none of it' inside 'all_served 2'
ok 'the entry has kept its UID' kept_entry
ok 'the certificate outlived it: no token was asked for again' test "$(events '"credential":"token".*"event":"csr"')" = 1

ok 'a reload of a wrong configuration fails with the place, and changes nothing' inside '
    pid=$(p MainPID); printf "adminn: {}\n" >/etc/we-agent/we-agent.yaml
    ! systemctl reload we-agent && logged "we-agent.yaml:1:.*adminn" && test "$(p MainPID)" = $pid && ready &&
        we-agent status | grep -q "the one of before is in force"'
ok 'mended, it succeeds' inside 'cp /root/good.yaml /etc/we-agent/we-agent.yaml && systemctl reload we-agent && ready'
ok 'and SIGHUP ends nobody' inside 'pid=$(p MainPID); kill -HUP $pid; sleep 1; test "$(p MainPID)" = $pid && ready'

ok 'the watchdog ends a process that hangs' inside '
    pid=$(p MainPID); kill -STOP $pid && within 60 another $pid && logged "[Ww]atchdog timeout"'
ok 'and it is ready again' inside 'within 20 ready'

ok 'a wrong configuration is told with file, line and fix' inside '
    printf "startup: {readyTimeout: 5s}\nadmin: {adress: off}\n" >/etc/we-agent/we-agent.yaml &&
        ! systemctl restart we-agent && logged "we-agent.yaml:2:.*adress"'
ok 'and stops the service for good, with exit status 78' inside '
    ended() { test "$(p ActiveState)" = failed; }
    within 5 ended && sleep 3 && test "$(p ActiveState)/$(p Result)/$(p ExecMainStatus)/$(p NRestarts)" = failed/exit-code/78/0'
ok 'mended, it starts' inside 'cp /root/good.yaml /etc/we-agent/we-agent.yaml && systemctl start we-agent && within 20 ready'
ok 'a stop takes nothing from programs' inside '
    systemctl stop we-agent && test "$(p Result)" = success && test -s /run/we-agent/payments/key.pem'
ok 'and it starts again as the same entry' inside 'systemctl start we-agent && within 20 ready'
ok 'whose UID is still the first' kept_entry
