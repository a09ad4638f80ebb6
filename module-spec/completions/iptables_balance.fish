# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_iptables_balance_global_optspecs
    string join \n h/help V/version
end

function __fish_iptables_balance_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_iptables_balance_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_iptables_balance_using_subcommand
    set -l cmd (__fish_iptables_balance_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -s h -l help -d 'Print help'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -s V -l version -d 'Print version'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "plan" -d 'Print the iptables-restore text that builds the balancer on an empty host'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "apply" -d 'Apply a request, and show the changes'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "check" -d 'Show the changes that `apply` would make'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "watch" -d 'Apply a request, check the backends for ever, and apply it again when one dies or comes back'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "hold" -d 'Take a backend out of service until it is released, or for a while'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "release" -d 'Bring a backend back that is held'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "explain" -d 'Show who gets which share of the connections by any rules, and the known mistakes in them'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "status" -d 'Show the balancers of this host: shares, who is in service or why not, connections'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "schema" -d 'Print a JSON Schema'
complete -c iptables_balance -n "__fish_iptables_balance_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand plan" -l current -d 'Print the text that turns this dump of iptables-save into the balancer instead; nothing if they do not differ' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand plan" -l family -d 'Print one family only' -r -f -a "ipv4\t''
ipv6\t''"
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand plan" -s h -l help -d 'Print help'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand apply" -s h -l help -d 'Print help'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand check" -l exit-code -d 'Exit with 3 if there are changes'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand check" -s h -l help -d 'Print help'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand watch" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand hold" -l balancer -d 'The balancer of the set; needed where several have the backend' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand hold" -l request -d 'The request to apply, instead of the one that was last applied: a file, or - for standard input' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand hold" -l for -d 'The time after which the hold ends, such as 2h or "1day 12h"; without it only `release` ends it' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand hold" -l reason -d 'The reason, for everybody who sees the hold' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand hold" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand release" -l balancer -d 'The balancer of the set; needed where several have the backend' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand release" -l request -d 'The request to apply, instead of the one that was last applied: a file, or - for standard input' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand release" -s h -l help -d 'Print help'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand explain" -l chain -d 'Explain this chain only. May be given several times' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand explain" -l format -d 'The format of the output' -r -f -a "text\t''
json\t''
html\t''
prometheus\t''"
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand explain" -l variant -d 'The iptables variant of this host' -r -f -a "nft\t''
legacy\t''"
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand explain" -l family -d 'The family of the dump, where it does not tell' -r -f -a "ipv4\t''
ipv6\t''"
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand explain" -l exit-code -d 'Exit with 3 if there is a mistake'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand explain" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand status" -l format -d 'The form of the output; prometheus is for the textfile collector of the node exporter' -r -f -a "text\t''
json\t''
prometheus\t''"
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand status" -l watch -d 'Show it again every so many seconds' -r
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand status" -s h -l help -d 'Print help'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand schema" -s h -l help -d 'Print help'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "plan" -d 'Print the iptables-restore text that builds the balancer on an empty host'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "apply" -d 'Apply a request, and show the changes'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "check" -d 'Show the changes that `apply` would make'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "watch" -d 'Apply a request, check the backends for ever, and apply it again when one dies or comes back'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "hold" -d 'Take a backend out of service until it is released, or for a while'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "release" -d 'Bring a backend back that is held'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "explain" -d 'Show who gets which share of the connections by any rules, and the known mistakes in them'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "status" -d 'Show the balancers of this host: shares, who is in service or why not, connections'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "schema" -d 'Print a JSON Schema'
complete -c iptables_balance -n "__fish_iptables_balance_using_subcommand help; and not __fish_seen_subcommand_from plan apply check watch hold release explain status schema help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
