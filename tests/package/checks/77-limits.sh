# The limits of the unit are reached.
# shellcheck shell=bash disable=SC2154,SC2016

mebibytes() { echo $(($(cat "$1") >> 20)); }
# hogs N: has it hold all that one user may have it hold, for so many connections as are let in.
hogs() {
    inside "rm -f /root/hog.summary
        systemd-run --quiet --unit=hog --collect --property=LimitNOFILE=8192 /root/hog /run/we-agent/payments/agent.sock $1 /root/hog.summary
        within 30 test -e /root/hog.summary && cat /root/hog.summary"
}
ok 'the unit has limits' inside '
    for limit in MemoryMax=1073741824 MemorySwapMax=0 TasksMax=1024 OOMPolicy=continue; do
        systemctl show we-agent --property="${limit%%=*}" | grep -x "$limit" || exit 1
    done'
if memory=$(machine limit we-agent.service memory 2>/dev/null) && tasks=$(machine limit we-agent.service pids 2>/dev/null); then
    before=$(inside 'p MainPID')
    limits_are() { inside 'p MemoryMax' >"$memory/memory.limit_in_bytes" && inside 'p TasksMax' >"$tasks/pids.max"; }
    ok 'they can be applied here' limits_are
    within_them() {
        hogs 2000 && inside 'within 20 ready' &&
            echo "# at most $(mebibytes "$memory/memory.max_usage_in_bytes") MiB, $(cat "$tasks/pids.current") tasks" &&
            test "$(inside 'p MainPID')" = "$before"
    }
    ok 'what one user can have it hold is within them' within_them
    arrange 'systemctl stop hog'
    # A thread that it needs meanwhile it does not get, so what it was for is done later.
    echo 1 >"$tasks/pids.max"
    ok 'one task more is refused' count 1 '^max [1-9]' "$tasks/pids.events"
    ok 'who asks is served meanwhile' inside 'given_to root'
    echo max >"$tasks/pids.max"
    ok 'then it rotates, as the same process' eval 'rotates && test "$(inside "p MainPID")" = "$before"'
    # With what it has and a little: one user may have it hold more.
    arrange 'consumers_start'
    ok 'when its memory is at an end' eval 'echo $(($(cat "$memory/memory.usage_in_bytes") + (8 << 20))) >"$memory/memory.limit_in_bytes"; hogs 2000 || :'
    ok 'the kernel ends it, and it comes back' inside "
        within 60 another $before && systemctl stop hog && within 20 ready && journalctl -u we-agent --output=cat | grep 'status=9/KILL'"
    ok 'and rotates' rotates
    ok 'consumers of socket and files saw none of it' inside 'all_served 1'
    ok 'the entry has kept its UID' kept_entry
else
    skip 'the limits are reached' 'this host has no control groups of version 1 for memory and tasks'
fi
