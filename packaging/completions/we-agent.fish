# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_we_agent_global_optspecs
    string join \n h/help V/version
end

function __fish_we_agent_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_we_agent_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_we_agent_using_subcommand
    set -l cmd (__fish_we_agent_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c we-agent -n "__fish_we_agent_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c we-agent -n "__fish_we_agent_needs_command" -s V -l version -d 'Print version'
complete -c we-agent -n "__fish_we_agent_needs_command" -f -a "run" -d 'Run the daemon'
complete -c we-agent -n "__fish_we_agent_needs_command" -f -a "status" -d 'Show what the daemon knows of every workload'
complete -c we-agent -n "__fish_we_agent_needs_command" -f -a "reload" -d 'Have the daemon read its configuration again'
complete -c we-agent -n "__fish_we_agent_needs_command" -f -a "wait" -d 'Return when the workloads are ready'
complete -c we-agent -n "__fish_we_agent_needs_command" -f -a "permit" -d 'Let the daemon\'s group read the bundles, and nobody else'
complete -c we-agent -n "__fish_we_agent_needs_command" -f -a "exec" -d 'Run one command for the daemon; systemd starts this (we-agent-exec@.service) for each probe and hook'
complete -c we-agent -n "__fish_we_agent_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c we-agent -n "__fish_we_agent_using_subcommand run" -l root -d 'Directory that every path of the agent is looked up below' -r -F
complete -c we-agent -n "__fish_we_agent_using_subcommand run" -l config -d 'Configuration file, taken as it is; the default is /etc/we-agent/we-agent.yaml below the root, if it exists' -r -F
complete -c we-agent -n "__fish_we_agent_using_subcommand run" -l log-format -d 'How to write the log' -r -f -a "auto\t'Journald when stderr is connected to the journal, else text'
text\t'Lines for people, on stderr'
json\t'One JSON object a line, on stderr'
journald\t'Structured entries, sent to the journal'"
complete -c we-agent -n "__fish_we_agent_using_subcommand run" -l log-level -d 'What to log: error, warn, info, debug, trace, or target=level pairs; wins over log.level of the configuration' -r
complete -c we-agent -n "__fish_we_agent_using_subcommand run" -l exec-socket -d 'Socket of the runner that commands of probes and hooks are handed to (we-agent-exec.socket), taken as it is; without one, the daemon runs them itself' -r -F
complete -c we-agent -n "__fish_we_agent_using_subcommand run" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c we-agent -n "__fish_we_agent_using_subcommand status" -l root -d 'Directory that every path of the agent is looked up below' -r -F
complete -c we-agent -n "__fish_we_agent_using_subcommand status" -l json -d 'Print JSON'
complete -c we-agent -n "__fish_we_agent_using_subcommand status" -s h -l help -d 'Print help'
complete -c we-agent -n "__fish_we_agent_using_subcommand reload" -l root -d 'Directory that every path of the agent is looked up below' -r -F
complete -c we-agent -n "__fish_we_agent_using_subcommand reload" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c we-agent -n "__fish_we_agent_using_subcommand wait" -l root -d 'Directory that every path of the agent is looked up below' -r -F
complete -c we-agent -n "__fish_we_agent_using_subcommand wait" -l timeout -d 'Give up after this time, for example 90s or 5min; the default is never' -r
complete -c we-agent -n "__fish_we_agent_using_subcommand wait" -l for -d 'What to wait for' -r -f -a "ready\t'A valid certificate, a registration that the control plane has acknowledged, and no inbound listener that failed'
identity\t'A certificate that has not expired, where programs find it; a kept one needs no control plane'"
complete -c we-agent -n "__fish_we_agent_using_subcommand wait" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c we-agent -n "__fish_we_agent_using_subcommand permit" -l root -d 'Directory that every path of the agent is looked up below' -r -F
complete -c we-agent -n "__fish_we_agent_using_subcommand permit" -l config -d 'Configuration file, as that of run: it says whose token is to be removed' -r -F
complete -c we-agent -n "__fish_we_agent_using_subcommand permit" -l group -d 'The group that the daemon runs as, by name or number' -r
complete -c we-agent -n "__fish_we_agent_using_subcommand permit" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c we-agent -n "__fish_we_agent_using_subcommand exec" -s h -l help -d 'Print help'
complete -c we-agent -n "__fish_we_agent_using_subcommand help; and not __fish_seen_subcommand_from run status reload wait permit exec help" -f -a "run" -d 'Run the daemon'
complete -c we-agent -n "__fish_we_agent_using_subcommand help; and not __fish_seen_subcommand_from run status reload wait permit exec help" -f -a "status" -d 'Show what the daemon knows of every workload'
complete -c we-agent -n "__fish_we_agent_using_subcommand help; and not __fish_seen_subcommand_from run status reload wait permit exec help" -f -a "reload" -d 'Have the daemon read its configuration again'
complete -c we-agent -n "__fish_we_agent_using_subcommand help; and not __fish_seen_subcommand_from run status reload wait permit exec help" -f -a "wait" -d 'Return when the workloads are ready'
complete -c we-agent -n "__fish_we_agent_using_subcommand help; and not __fish_seen_subcommand_from run status reload wait permit exec help" -f -a "permit" -d 'Let the daemon\'s group read the bundles, and nobody else'
complete -c we-agent -n "__fish_we_agent_using_subcommand help; and not __fish_seen_subcommand_from run status reload wait permit exec help" -f -a "exec" -d 'Run one command for the daemon; systemd starts this (we-agent-exec@.service) for each probe and hook'
complete -c we-agent -n "__fish_we_agent_using_subcommand help; and not __fish_seen_subcommand_from run status reload wait permit exec help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
