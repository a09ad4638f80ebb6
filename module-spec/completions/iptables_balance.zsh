#compdef iptables_balance

autoload -U is-at-least

_iptables_balance() {
    typeset -A opt_args
    typeset -a _arguments_options
    local ret=1

    if is-at-least 5.2; then
        _arguments_options=(-s -S -C)
    else
        _arguments_options=(-s -C)
    fi

    local context curcontext="$curcontext" state line
    _arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
'-V[Print version]' \
'--version[Print version]' \
":: :_iptables_balance_commands" \
"*::: :->iptables_balance" \
&& ret=0
    case $state in
    (iptables_balance)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:iptables_balance-command-$line[1]:"
        case $line[1] in
            (plan)
_arguments "${_arguments_options[@]}" : \
'--current=[Print the text that turns this dump of iptables-save into the balancer instead; nothing if they do not differ]:DUMP:_default' \
'--family=[Print one family only]:FAMILY:(ipv4 ipv6)' \
'-h[Print help]' \
'--help[Print help]' \
':request -- The request\: a file, or - for standard input:_default' \
&& ret=0
;;
(apply)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
':request -- The request\: a file, or - for standard input:_default' \
&& ret=0
;;
(check)
_arguments "${_arguments_options[@]}" : \
'--exit-code[Exit with 3 if there are changes]' \
'-h[Print help]' \
'--help[Print help]' \
':request -- The request\: a file, or - for standard input:_default' \
&& ret=0
;;
(watch)
_arguments "${_arguments_options[@]}" : \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':request -- The request\: a file:_default' \
&& ret=0
;;
(hold)
_arguments "${_arguments_options[@]}" : \
'--balancer=[The balancer of the set; needed where several have the backend]:NAME:_default' \
'--request=[The request to apply, instead of the one that was last applied\: a file, or - for standard input]:FILE:_default' \
'--for=[The time after which the hold ends, such as 2h or "1day 12h"; without it only \`release\` ends it]:TIME:_default' \
'--reason=[The reason, for everybody who sees the hold]:TEXT:_default' \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
':name -- The name of the balancer or set:_default' \
':backend -- The backend\: ADDRESS or ADDRESS\:PORT:_default' \
&& ret=0
;;
(release)
_arguments "${_arguments_options[@]}" : \
'--balancer=[The balancer of the set; needed where several have the backend]:NAME:_default' \
'--request=[The request to apply, instead of the one that was last applied\: a file, or - for standard input]:FILE:_default' \
'-h[Print help]' \
'--help[Print help]' \
':name -- The name of the balancer or set:_default' \
':backend -- The backend\: ADDRESS or ADDRESS\:PORT:_default' \
&& ret=0
;;
(explain)
_arguments "${_arguments_options[@]}" : \
'*--chain=[Explain this chain only. May be given several times]:NAME:_default' \
'--format=[The format of the output]:FORMAT:(text json html prometheus)' \
'()--variant=[The iptables variant of this host]:VARIANT:(nft legacy)' \
'--family=[The family of the dump, where it does not tell]:FAMILY:(ipv4 ipv6)' \
'--exit-code[Exit with 3 if there is a mistake]' \
'-h[Print help (see more with '\''--help'\'')]' \
'--help[Print help (see more with '\''--help'\'')]' \
'::dump -- The text of iptables-save or ip6tables-save, best with -c\: a file, or - for standard input. Without it this host is read:_default' \
&& ret=0
;;
(status)
_arguments "${_arguments_options[@]}" : \
'--format=[The form of the output; prometheus is for the textfile collector of the node exporter]:FORMAT:(text json prometheus)' \
'--watch=[Show it again every so many seconds]:SECONDS:_default' \
'-h[Print help]' \
'--help[Print help]' \
'::name -- The balancer or set; without it all of which a request was applied here:_default' \
&& ret=0
;;
(schema)
_arguments "${_arguments_options[@]}" : \
'-h[Print help]' \
'--help[Print help]' \
':kind -- The schema of a request, that of a result, or that of the output of a subcommand:(request result explain status)' \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
":: :_iptables_balance__subcmd__help_commands" \
"*::: :->help" \
&& ret=0

    case $state in
    (help)
        words=($line[1] "${words[@]}")
        (( CURRENT += 1 ))
        curcontext="${curcontext%:*:*}:iptables_balance-help-command-$line[1]:"
        case $line[1] in
            (plan)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(apply)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(check)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(watch)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(hold)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(release)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(explain)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(status)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(schema)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
(help)
_arguments "${_arguments_options[@]}" : \
&& ret=0
;;
        esac
    ;;
esac
;;
        esac
    ;;
esac
}

(( $+functions[_iptables_balance_commands] )) ||
_iptables_balance_commands() {
    local commands; commands=(
'plan:Print the iptables-restore text that builds the balancer on an empty host' \
'apply:Apply a request, and show the changes' \
'check:Show the changes that \`apply\` would make' \
'watch:Apply a request, check the backends for ever, and apply it again when one dies or comes back' \
'hold:Take a backend out of service until it is released, or for a while' \
'release:Bring a backend back that is held' \
'explain:Show who gets which share of the connections by any rules, and the known mistakes in them' \
'status:Show the balancers of this host\: shares, who is in service or why not, connections' \
'schema:Print a JSON Schema' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'iptables_balance commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__apply_commands] )) ||
_iptables_balance__subcmd__apply_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance apply commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__check_commands] )) ||
_iptables_balance__subcmd__check_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance check commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__explain_commands] )) ||
_iptables_balance__subcmd__explain_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance explain commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help_commands] )) ||
_iptables_balance__subcmd__help_commands() {
    local commands; commands=(
'plan:Print the iptables-restore text that builds the balancer on an empty host' \
'apply:Apply a request, and show the changes' \
'check:Show the changes that \`apply\` would make' \
'watch:Apply a request, check the backends for ever, and apply it again when one dies or comes back' \
'hold:Take a backend out of service until it is released, or for a while' \
'release:Bring a backend back that is held' \
'explain:Show who gets which share of the connections by any rules, and the known mistakes in them' \
'status:Show the balancers of this host\: shares, who is in service or why not, connections' \
'schema:Print a JSON Schema' \
'help:Print this message or the help of the given subcommand(s)' \
    )
    _describe -t commands 'iptables_balance help commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__apply_commands] )) ||
_iptables_balance__subcmd__help__subcmd__apply_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help apply commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__check_commands] )) ||
_iptables_balance__subcmd__help__subcmd__check_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help check commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__explain_commands] )) ||
_iptables_balance__subcmd__help__subcmd__explain_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help explain commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__help_commands] )) ||
_iptables_balance__subcmd__help__subcmd__help_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help help commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__hold_commands] )) ||
_iptables_balance__subcmd__help__subcmd__hold_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help hold commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__plan_commands] )) ||
_iptables_balance__subcmd__help__subcmd__plan_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help plan commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__release_commands] )) ||
_iptables_balance__subcmd__help__subcmd__release_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help release commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__schema_commands] )) ||
_iptables_balance__subcmd__help__subcmd__schema_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help schema commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__status_commands] )) ||
_iptables_balance__subcmd__help__subcmd__status_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help status commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__help__subcmd__watch_commands] )) ||
_iptables_balance__subcmd__help__subcmd__watch_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance help watch commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__hold_commands] )) ||
_iptables_balance__subcmd__hold_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance hold commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__plan_commands] )) ||
_iptables_balance__subcmd__plan_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance plan commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__release_commands] )) ||
_iptables_balance__subcmd__release_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance release commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__schema_commands] )) ||
_iptables_balance__subcmd__schema_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance schema commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__status_commands] )) ||
_iptables_balance__subcmd__status_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance status commands' commands "$@"
}
(( $+functions[_iptables_balance__subcmd__watch_commands] )) ||
_iptables_balance__subcmd__watch_commands() {
    local commands; commands=()
    _describe -t commands 'iptables_balance watch commands' commands "$@"
}

if [ "$funcstack[1]" = "_iptables_balance" ]; then
    _iptables_balance "$@"
else
    compdef _iptables_balance iptables_balance
fi
