# Copyright: the authors of iptables_balance
# MIT OR Apache-2.0
"""Keeps the program on the host, and sends it only the request.

The host keeps the program under a name made of its SHA-256. One shell command finds the architecture, checks that nobody else can
write to the program or above it, compares the checksum, and runs the program with the request on standard input. Only where the
program is missing is it sent. The host needs no Python, except for `async`.
"""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

import datetime
import json
import os
import shlex

from ansible.module_utils.common.text.converters import to_bytes, to_text
from ansible.module_utils.six.moves.collections_abc import Mapping, Sequence
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible.vars.clean import remove_internal_keys

display = Display()

PROGRAMS = os.path.join(os.path.dirname(__file__), "..", "..", "files")

# The arguments are a directory, or nothing for the usual one, and ARCHITECTURE=SHA256 for each program. If the program is not run,
# a line `iptables_balance: WORD TEXT` says why. The directories above one that the user named are not checked.
COMMON = r"""
say() { echo "iptables_balance: $*"; exit 0; }
umask 022
LC_ALL=C
export LC_ALL
named=$1 arch=$(uname -m) sum=
shift
[ "$arch" ] || say failed "there is no uname on the PATH of the host"
for pair in "$@"; do case $pair in "$arch="*) sum=${pair#*=} ;; esac; done
[ "$sum" ] || say unsupported "$(uname -s) $arch"
if [ "$named" ]; then dir=$named
elif [ "$(id -u)" = 0 ]; then dir=/var/lib/iptables_balance/bin
else dir=$HOME/.iptables_balance/bin; fi
# True for what belongs to root or to this user, and is writable by nobody else. A symbolic link counts as writable.
mine() {
  set -- $(ls -ldn "$1")
  case $1 in ?????w*|????????w*) return 1 ;; esac
  [ "$3" = 0 ] || [ "$3" = "$(id -u)" ]
}
# Ends the script unless that holds for the directory and those above. From then on no path leads through a symbolic link.
safe() {
  dir=$(cd "$dir" && pwd -P) || say failed "cannot enter the directory"
  file=$dir/iptables_balance-$sum place=$dir
  while mine "${place:-/}"; do
    [ "$place" ] && [ -z "$named" ] || return 0
    place=${place%/*}
  done
  say unsafe "${place:-/}"
}
# True if the file has the expected checksum.
whole() { [ "$(sha256sum <"$1")" = "$sum  -" ]; }
"""

FIND = COMMON + r"""
[ -d "$dir" ] || say missing "$arch"
safe
[ -f "$file" ] && mine "$file" && whole "$file" || say missing "$arch"
"""

RUN = FIND + r"""
exec "$file" -
"""

ENSURE = FIND + r"""
say ready "$file"
"""

# The program is on standard input. It gets its name when it is whole. What killed transfers and other versions left is removed.
INSTALL = COMMON + r"""
try() { why=$("$@" 2>&1) || say failed "$why"; }
try mkdir -p "$dir"
safe
[ ! -d "$file" ] || say failed "$file is a directory"
new=$dir/.iptables_balance-new-$$
trap 'rm -f "$new"' EXIT
why=$( { cat >"$new"; } 2>&1 ) || say failed "$why"
whole "$new" || say failed "the transfer was incomplete, or sha256sum is missing"
try chmod 755 "$new"
try mv -f "$new" "$file"
for old in "$dir"/.iptables_balance-new-*; do [ -d "/proc/${old##*-}" ] || rm -f "$old"; done
for old in "$dir"/iptables_balance-*; do
  name=${old##*-}
  case $name in "$sum"|*[!0-9a-f]*) continue ;; esac
  [ ${#name} != 64 ] || rm -f "$dir/iptables_balance-$name"
done
say ready "$file"
"""


class ActionModule(ActionBase):
    """Runs the program on the host, as a module of its own would run."""

    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        task_vars = task_vars or {}
        # ansible-core before 2.16 resets class attributes of these names.
        self._supports_async = True
        self._supports_check_mode = True
        self._supports_diff = True
        result = super(ActionModule, self).run(tmp, task_vars)
        try:
            self._directory = self._named_directory(task_vars)
            result.update(self._run_later(task_vars) if self._task.async_val else self._run_now())
        except Refusal as refusal:
            result.update(failure(to_text(refusal)))
        return result

    def _run_now(self):
        request = to_bytes(self._request())
        answer = self._shell(RUN, request)
        if answer.word == "missing":
            answer = self._install(answer.text)
            if answer.word == "ready":
                answer = self._shell(RUN, request)
        return answer.result()

    def _run_later(self, task_vars):
        """Starts a module that runs the program, since only a module can be started by async_wrapper."""
        answer = self._shell(ENSURE)
        if answer.word == "missing":
            answer = self._install(answer.text)
        if answer.word != "ready":
            return answer.result()
        arguments = {"program": answer.text, "request": self._request()}
        return self._execute_module(
            module_name="iptables_balance.gateway.run_program",
            module_args=arguments,
            task_vars=task_vars,
            wrap_async=not self._connection.has_native_async,
        )

    def _named_directory(self, task_vars):
        if self._task.delegate_to:
            task_vars = task_vars.get("ansible_delegated_vars", {}).get(self._task.delegate_to, task_vars)
        directory = to_text(self._templar.template(task_vars.get("iptables_balance_directory")) or "")
        if directory and not directory.startswith("/"):
            raise Refusal("iptables_balance_directory: `%s` is not an absolute path" % directory)
        return directory

    def _request(self):
        """The arguments of the task as JSON."""
        arguments = dict(self._task.args)
        arguments["_ansible_check_mode"] = bool(self._task.check_mode)
        arguments["_ansible_diff"] = bool(self._task.diff)
        try:
            return json.dumps(arguments, default=encoded, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Refusal("an attribute has a value that JSON does not have: %s" % to_text(error))

    def _install(self, architecture):
        # The host says which one it needs. It must not choose another file of the control node.
        if architecture not in dict(checksums()):
            raise Refusal("the host asks for a program for `%s`, which this collection does not have" % architecture)
        program = os.path.join(PROGRAMS, architecture, "iptables_balance")
        display.vv("sending %s to the host" % program)
        try:
            with open(program, "rb") as file:
                content = file.read()
        except IOError as error:
            raise Refusal("cannot read the program of this collection: %s" % to_text(error))
        return self._shell(INSTALL, content)

    def _shell(self, script, stdin=None):
        """Runs a script on the host; returns its answer.

        Standard input of the connection carries the data, except where a terminal is in the way: with su, with connections
        that cannot do it, and with a sudo that insists on a terminal. There a file does.
        """
        # Within quotes csh, as a login shell, allows no line break and no `!`. No script has a backslash.
        words = ["/bin/sh", "-c", 'script=$1; shift; eval "$(printf %b "$script")"', "iptables_balance"]
        words += [script.replace("\n", "\\n").replace("!", "\\0041"), self._directory]
        words += ["%s=%s" % pair for pair in checksums()]
        environment = self._compute_environment_string()
        command = " ".join([environment] * bool(environment) + [shlex.quote(word) for word in words])
        if stdin is None:
            return Answer(self._low_level_execute_command(command + " </dev/null"))
        if self._can_pipe():
            answer = Answer(self._low_level_execute_command(command, in_data=stdin))
            if not answer.wants_terminal():
                return answer
            display.vv("this sudo insists on a terminal; the data goes through a file")
        return Answer(self._shell_with_file(command, stdin))

    def _can_pipe(self):
        become = self._connection.become
        uses_su = become is not None and become.name.rsplit(".", 1)[-1] == "su"
        return self._connection.has_pipelining and not uses_su

    def _shell_with_file(self, command, stdin):
        shell = self._connection._shell
        if shell.tmpdir is None:
            self._make_tmp_path()
        path = shell.join_path(shell.tmpdir, "stdin")
        self._transfer_data(path, stdin)
        self._fixup_perms2((shell.tmpdir, path))
        return self._low_level_execute_command("%s <%s" % (command, shlex.quote(path)))


class Refusal(Exception):
    """A task that cannot be run, with the reason."""


class Answer:
    """What a script said: the object that the program printed, or else a word and a text of its own in the last line."""

    def __init__(self, executed):
        self.rc = executed["rc"]
        self.stdout = executed["stdout"]
        self.stderr = executed["stderr"]
        # Not splitlines: rules of others, which the program quotes, may hold other separators.
        lines = [line.rstrip("\r") for line in self.stdout.split("\n")]
        self.object = last_object(lines)
        self.word, self.text = None, ""
        said = [line for line in lines if line][-1:]
        if self.object is None and said and said[0].startswith("iptables_balance: "):
            self.word, self.text = (said[0].split(" ", 2) + [""])[1:3]

    def wants_terminal(self):
        """True if sudo refused to run without a terminal."""
        complaint = self.stderr.lower()
        return self.rc != 0 and self.object is None and self.word is None and ("tty" in complaint or "terminal" in complaint)

    def result(self):
        """The result of the task, without keys by which a host would steer Ansible itself."""
        if self.object is not None:
            remove_internal_keys(self.object)
            return self.object
        if self.word == "unsupported":
            return failure(
                "this collection has programs for Linux on %s, but the host is %s; build the collection for it"
                % (" and ".join(sorted(dict(checksums()))), self.text),
            )
        if self.word == "unsafe":
            return failure(
                "the program is not kept on the host, because others may write to `%s`; it must belong to root or to the user "
                "who runs the program, and be writable by nobody else" % self.text,
            )
        if self.word == "missing":
            return failure("the program was sent to the host, but is gone already; does another version of this collection run there?")
        if self.word == "failed":
            return failure("cannot keep the program on the host: %s" % self.text, self)
        if self.rc in (126, 127):
            reason = "cannot run the program on the host; it needs glibc 2.17 or later, and a file system that is not mounted noexec"
            return failure(reason, self)
        return failure("the program gave no result", self)


def last_object(lines):
    """The JSON object that begins at the start of a line; lines of others may stand before and after it."""
    for at, line in enumerate(lines):
        if line.startswith("{"):
            try:
                return json.JSONDecoder().raw_decode("\n".join(lines[at:]))[0]
            except ValueError:
                continue
    return None


def failure(problem, answer=None):
    """A failed result, with the output that the problem was read from."""
    result = {"failed": True, "changed": False, "msg": problem}
    if answer is not None:
        result.update(rc=answer.rc, module_stdout=answer.stdout, module_stderr=answer.stderr)
    return result


def checksums():
    """Pairs of an architecture and the SHA-256 of its program, in the order of `sha256sum`."""
    try:
        with open(os.path.join(PROGRAMS, "SHA256SUMS")) as file:
            lines = [line.split() for line in file]
    except IOError as error:
        raise Refusal("this collection holds no program, it was not built by package.sh: %s" % to_text(error))
    return [(name.split("/")[0], checksum) for checksum, name in lines]


def encoded(value):
    """Values of Ansible's own types in JSON: encrypted strings, dates, lazy containers."""
    if hasattr(value, "__ENCRYPTED__"):
        return to_text(value)
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError("a value of type %s cannot be sent" % type(value).__name__)
