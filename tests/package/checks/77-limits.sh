# The limits of the unit are reached.
# shellcheck shell=bash disable=SC2154,SC2016

mebibytes() { echo $(($(cat "$1") >> 20)); }
# hogs N: a user whom the agent lets in has it hold all that one user may have held, until it ends.
hogs() {
    inside "rm -f /root/hog.summary; systemd-run --quiet --unit=hog --collect --property=LimitNOFILE=8192 /root/hog /run/we-agent/payments/agent.sock $1 /root/hog.summary"
}
ok 'the unit has limits' inside '
    for limit in MemoryMax=1073741824 MemorySwapMax=0 TasksMax=1024 OOMPolicy=continue; do
        systemctl show we-agent --property="${limit%%=*}" | grep -x "$limit" || exit 1
    done'
if memory=$(machine limit we-agent.service memory 2>/dev/null) && tasks=$(machine limit we-agent.service pids 2>/dev/null); then
    before=$(inside 'p MainPID')
    bound() { inside "p MemoryMax" >"$memory/memory.limit_in_bytes" && inside "p TasksMax" >"$tasks/pids.max"; }
    ok 'as they are' bound
    ok 'one user takes what one user may have' hogs 2000
    held() {
        inside 'within 30 test -e /root/hog.summary; cat /root/hog.summary; within 20 ready' &&
            echo "# at most $(mebibytes "$memory/memory.max_usage_in_bytes") MiB, $(cat "$tasks/pids.peak" 2>/dev/null) tasks" &&
            test "$(inside 'p MainPID')" = "$before"
    }
    ok 'which is within the limits: it goes on' held
    ok 'and rotates' rotates
    arrange 'systemctl stop hog'
    ok 'without a single task more' eval 'sleep 12; cat $tasks/pids.current; echo 1 >"$tasks/pids.max"'
    ok 'it goes on, and rotates' rotates
    arrange 'consumers_start'
    ok 'and serves who comes' inside 'given_to root && all_served 1'
    ok 'for it is the same process' test "$(inside 'p MainPID')" = "$before"
    echo max >"$tasks/pids.max"
    arrange 'consumers_start'
    # What it has, and a little; one user may take 64.
    ok 'with as little memory as it has now' eval 'echo $(($(cat "$memory/memory.usage_in_bytes") + (16 << 20))) >"$memory/memory.limit_in_bytes"'
    ok 'one user takes what one user may have' hogs 2000
    ok 'the kernel ends it, and it comes back' inside "within 60 another $before && within 20 ready && journalctl -u we-agent | grep -E 'status=9/KILL|oom'"
    arrange 'systemctl stop hog'
    ok 'and rotates' rotates
    ok 'consumers of socket and files saw none of it' inside 'all_served 1'
    ok 'the entry has kept its UID' kept_entry
else
    skip 'the limits are reached' 'this host has no control groups of version 1 for memory and pids'
fi
