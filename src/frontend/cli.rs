//! The subcommands, for a person at a terminal or a script.
//!
//! Help, suggestions, completions and the man page come from one definition,
//! [`command`].

mod explain;

use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::thread;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use super::invocation::{PLAIN, parse};
use super::{schema, terminal};
use crate::converge::outcome::RunMode;
use crate::diff;
use crate::diff::change::Change;
use crate::host::lookup;
use crate::maintenance::{self, Action, Order};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Endpoint, Family, Name, Table};
use crate::plan::{self, Plan};
use crate::report::Report;
use crate::request::{DesiredState, Request, UncheckedRequest};
use crate::restore::{self, Step};
use crate::run::{Invocation, Run};
use crate::{status, watch};

/// Spreads new connections over servers with the kernel's iptables.
#[derive(Parser)]
#[command(
    name = "iptables_balance",
    version,
    disable_help_subcommand = false,
    after_help = "REQUEST is a file with a JSON object, or - for standard input.\n\n\
        Without arguments the program reads standard input: a JSON request, or CFEngine's promise-type\n\
        protocol. With the path of a file of arguments (it holds a `/`), or with `-` for standard input, it is an\n\
        Ansible module.\n\n\
        Exit codes: 0 done, 1 failed, 2 bad usage or bad request, 3 see `check --exit-code` and `explain --exit-code`."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the iptables-restore text that builds the balancer on an empty host.
    Plan {
        /// The request: a file, or - for standard input.
        request: OsString,
        /// Print the text that turns this dump of iptables-save into the balancer
        /// instead; nothing if they do not differ.
        #[arg(long, value_name = "DUMP")]
        current: Option<OsString>,
        /// Print one family only.
        #[arg(long)]
        family: Option<FamilyArgument>,
    },
    /// Apply a request, and show the changes.
    Apply {
        /// The request: a file, or - for standard input.
        request: OsString,
    },
    /// Show the changes that `apply` would make.
    Check {
        /// The request: a file, or - for standard input.
        request: OsString,
        /// Exit with 3 if there are changes.
        #[arg(long)]
        exit_code: bool,
    },
    /// Apply a request, check the backends for ever, and apply it again when one dies or comes back.
    ///
    /// It is made for systemd. SIGHUP reads the request again; SIGTERM ends it and leaves the rules as they are.
    Watch {
        /// The request: a file.
        request: OsString,
    },
    /// Take a backend out of service until it is released, or for a while.
    ///
    /// The request as it was last applied is applied again. Every later run honours the hold and tells of it.
    Hold {
        #[command(flatten)]
        backend: BackendArguments,
        /// The time after which the hold ends, such as 2h or "1day 12h"; without it only `release` ends it.
        #[arg(long = "for", value_name = "TIME", value_parser = hold_time)]
        time: Option<Duration>,
        /// The reason, for everybody who sees the hold.
        #[arg(long, value_name = "TEXT", value_parser = reason)]
        reason: Option<String>,
    },
    /// Bring a backend back that is held.
    Release {
        #[command(flatten)]
        backend: BackendArguments,
    },
    /// Show who gets which share of the connections by any rules, and the known mistakes in them.
    ///
    /// It reads the text of iptables-save, whoever made the rules, or those of this host.
    Explain(explain::ExplainArguments),
    /// Show the balancers of this host: shares, who is in service or why not, connections.
    Status {
        /// The balancer or set; without it all of which a request was applied here.
        #[arg(value_parser = Name::new)]
        name: Option<Name>,
        /// The form of the output; prometheus is for the textfile collector of the node exporter.
        #[arg(long, default_value = "text")]
        format: StatusFormat,
        /// Show it again every so many seconds.
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
        watch: Option<u64>,
    },
    /// Print a JSON Schema.
    Schema {
        /// The schema of a request, that of a result, or that of the output of a subcommand.
        kind: SchemaArgument,
    },
}

#[derive(Args)]
struct BackendArguments {
    /// The name of the balancer or set.
    #[arg(value_parser = Name::new)]
    name: Name,
    /// The backend: ADDRESS or ADDRESS:PORT.
    #[arg(value_parser = endpoint)]
    backend: Endpoint,
    /// The balancer of the set; needed where several have the backend.
    #[arg(long, value_name = "NAME")]
    balancer: Option<String>,
    /// The request to apply, instead of the one that was last applied: a file, or - for standard input.
    #[arg(long, value_name = "FILE")]
    request: Option<OsString>,
}

fn endpoint(text: &str) -> Result<Endpoint, &'static str> {
    let problem =
        "is neither ADDRESS nor ADDRESS:PORT; an IPv6 address with a port is [ADDRESS]:PORT";
    Endpoint::parse(text).ok_or(problem)
}

/// A time of at least a second.
fn hold_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match time.as_secs() {
        0 => Err("is less than a second".to_owned()),
        _ => Ok(time),
    }
}

/// A reason that stays on one line of a message.
fn reason(text: &str) -> Result<String, &'static str> {
    const LONGEST: usize = 200;
    match text {
        _ if text.chars().any(char::is_control) => Err("has a control character in it"),
        _ if text.chars().count() > LONGEST => Err("is longer than 200 characters"),
        text => Ok(text.trim().to_owned()),
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum FamilyArgument {
    Ipv4,
    Ipv6,
}

impl From<FamilyArgument> for Family {
    fn from(argument: FamilyArgument) -> Self {
        match argument {
            FamilyArgument::Ipv4 => Self::Ipv4,
            FamilyArgument::Ipv6 => Self::Ipv6,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum StatusFormat {
    Text,
    Json,
    Prometheus,
}

#[derive(Clone, Copy, ValueEnum)]
enum SchemaArgument {
    Request,
    Result,
    Explain,
    Status,
}

impl From<SchemaArgument> for schema::Kind {
    fn from(argument: SchemaArgument) -> Self {
        match argument {
            SchemaArgument::Request => Self::Request,
            SchemaArgument::Result => Self::Result,
            SchemaArgument::Explain => Self::Explain,
            SchemaArgument::Status => Self::Status,
        }
    }
}

/// The definition of the command line.
#[must_use]
pub fn command() -> clap::Command {
    Arguments::command()
}

/// The text of `--help`.
#[must_use]
pub fn help() -> String {
    command().render_help().to_string()
}

/// A mistake in the arguments or in a request; exit code 2.
struct UsageError(String);

impl<E: std::error::Error> From<E> for UsageError {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// Runs a subcommand; returns the exit code.
///
/// # Errors
/// When the output cannot be written.
pub fn run(
    arguments: impl IntoIterator<Item = OsString>,
    out: &mut (impl Write + IsTerminal),
    errors: &mut impl Write,
    run: Run,
) -> io::Result<u8> {
    let words = std::iter::once(OsString::from("iptables_balance")).chain(arguments);
    let command = match Arguments::try_parse_from(words) {
        Ok(arguments) => arguments.command,
        Err(error) if !error.use_stderr() => {
            return out
                .write_all(error.render().to_string().as_bytes())
                .map(|()| 0);
        }
        Err(error) => return complain(&one_line(&error), 2, errors),
    };
    match command {
        Command::Schema { kind } => writeln!(out, "{}", schema::text(kind.into())).map(|()| 0),
        Command::Plan {
            request,
            current,
            family,
        } => match print_plan(&request, current.as_ref(), family.map(Family::from)) {
            Ok(Ok(text)) => out.write_all(&text).map(|()| 0),
            Ok(Err(unresolved)) => complain(&unresolved, 1, errors),
            Err(UsageError(problem)) => complain(&problem, 2, errors),
        },
        Command::Apply { request } => act(&request, RunMode::Apply, false, (out, errors), run),
        Command::Check { request, exit_code } => {
            act(&request, RunMode::Check, exit_code, (out, errors), run)
        }
        Command::Watch { request } => follow(&request, errors),
        Command::Status {
            name,
            format,
            watch: None,
        } => print_status(name.as_ref(), format, (out, errors)),
        Command::Status {
            name,
            format,
            watch: Some(seconds),
        } => loop {
            if out.is_terminal() {
                out.write_all(b"\x1b[H\x1b[2J")?;
            }
            let code = print_status(name.as_ref(), format, (out, errors))?;
            if code != 0 {
                return Ok(code);
            }
            out.flush()?;
            thread::sleep(Duration::from_secs(seconds));
        },
        Command::Hold {
            backend,
            time,
            reason,
        } => {
            let seconds = time.map(|time| time.as_secs());
            maintain(backend, &Action::Hold { seconds, reason }, (out, errors))
        }
        Command::Explain(arguments) => explain::print(&arguments, (out, errors)),
        Command::Release { backend } => maintain(backend, &Action::Release, (out, errors)),
    }
}

fn print_status(
    name: Option<&Name>,
    format: StatusFormat,
    (out, errors): (&mut (impl Write + IsTerminal), &mut impl Write),
) -> io::Result<u8> {
    let found = match status::status(name) {
        Ok(found) => found,
        Err(error) => return complain(&format!("{error:#}"), 1, errors),
    };
    for warning in &found.warnings {
        writeln!(errors, "iptables_balance: warning: {warning}")?;
    }
    let text = match format {
        StatusFormat::Text => super::status::text(&found, style(out)),
        StatusFormat::Prometheus => super::status::prometheus(&found),
        StatusFormat::Json => serde_json::to_string(&found)? + "\n",
    };
    out.write_all(text.as_bytes()).map(|()| 0)
}

/// Watches until a signal ends it. Each line is flushed: a journal reads it.
fn follow(request: &OsString, errors: &mut impl Write) -> io::Result<u8> {
    let read = || match checked_request(request) {
        Ok(request) => Ok(request),
        Err(UsageError(problem)) => Err(anyhow::anyhow!(problem)),
    };
    if request == "-" {
        let problem = "watch: the request is read again after SIGHUP, so it must be a file";
        return complain(problem, 2, errors);
    }
    match read() {
        Err(error) => return complain(&error.to_string(), 2, errors),
        Ok(request) if request.state == DesiredState::Absent => {
            let problem = "state: `absent` leaves nothing to watch; say `apply` instead";
            return complain(problem, 2, errors);
        }
        Ok(_) => {}
    }
    let mut tell = |line: &str| {
        writeln!(errors, "iptables_balance: {line}").ok();
    };
    match watch::watch(&read, &mut tell) {
        Ok(()) => Ok(0),
        Err(error) => complain(&format!("{error:#}"), 1, errors),
    }
}

fn maintain(
    arguments: BackendArguments,
    action: &Action,
    (out, errors): (&mut (impl Write + IsTerminal), &mut impl Write),
) -> io::Result<u8> {
    let request = arguments.request.as_ref().map(checked_request);
    let request = match request.transpose() {
        Ok(request) => request,
        Err(UsageError(problem)) => return complain(&problem, 2, errors),
    };
    let order = Order {
        name: arguments.name,
        balancer: arguments.balancer,
        backend: arguments.backend,
        request,
    };
    match maintenance::carry_out(&order, action) {
        Ok(report) => show(&report, false, (out, errors)),
        Err(error) => complain(&format!("{error:#}; nothing was changed"), 1, errors),
    }
}

/// The error and the tips of the parser, without usage, on one line.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let is_said = |line: &&str| {
        !line.is_empty() && !line.starts_with("Usage:") && !line.starts_with("For more information")
    };
    let lines = text.lines().map(str::trim).filter(is_said);
    let lines = lines.map(|line| line.strip_prefix("tip: ").unwrap_or(line));
    let mut said = lines.collect::<Vec<_>>().join("; ").replace(":; ", ": ");
    if error.kind() == ErrorKind::InvalidSubcommand {
        said += " (the path of a file of arguments needs a `/`)";
    }
    said
}

fn complain(problem: &str, code: u8, errors: &mut impl Write) -> io::Result<u8> {
    writeln!(errors, "iptables_balance: {problem}")?;
    Ok(code)
}

fn act(
    request: &OsString,
    mode: RunMode,
    exit_code: bool,
    (out, errors): (&mut (impl Write + IsTerminal), &mut impl Write),
    run: Run,
) -> io::Result<u8> {
    let request = match checked_request(request) {
        Ok(request) => request,
        Err(UsageError(problem)) => return complain(&problem, 2, errors),
    };
    let report = run(&Invocation {
        request,
        mode,
        diff: true,
    });
    show(&report, exit_code, (out, errors))
}

/// Shows a report; returns the exit code.
fn show(
    report: &Report,
    exit_code: bool,
    (out, errors): (&mut (impl Write + IsTerminal), &mut impl Write),
) -> io::Result<u8> {
    for warning in &report.warnings {
        writeln!(errors, "iptables_balance: warning: {warning}")?;
    }
    out.write_all(terminal::report(report, style(out)).as_bytes())?;
    exit(report, exit_code, errors)
}

fn style(out: &impl IsTerminal) -> terminal::Style {
    let is_colourless = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    match out.is_terminal() && !is_colourless {
        true => terminal::Style::Terminal,
        false => terminal::Style::Plain,
    }
}

fn exit(report: &Report, exit_code: bool, errors: &mut impl Write) -> io::Result<u8> {
    match (report.failed, exit_code && report.changed) {
        (true, _) => complain(&report.msg, 1, errors),
        (false, true) => Ok(3),
        (false, false) => Ok(0),
    }
}

fn read(file: &OsString) -> Result<Vec<u8>, UsageError> {
    let mut text = Vec::new();
    let read = match file == "-" {
        true => io::stdin().lock().read_to_end(&mut text).map(|_| text),
        false => fs::read(file),
    };
    read.map_err(|error| UsageError(format!("cannot read `{}`: {error}", file.to_string_lossy())))
}

/// The request in a file. The subcommand decides on check mode and diff.
fn checked_request(file: &OsString) -> Result<UncheckedRequest, UsageError> {
    let invocation = parse(&read(file)?, &PLAIN).map_err(UsageError)?;
    let checked = invocation.request.check();
    checked.map_err(|error| UsageError(error.to_string()))?;
    Ok(invocation.request)
}

/// The text, or the reason why a name has no address.
fn print_plan(
    request: &OsString,
    current: Option<&OsString>,
    family: Option<Family>,
) -> Result<Result<Vec<u8>, String>, UsageError> {
    let unchecked = checked_request(request)?;
    let current = current.map(read).transpose()?;
    match unchecked.resolve(&lookup) {
        Ok(request) => planned(&request, current.as_deref(), family).map(Ok),
        Err(unresolved) => Ok(Err(unresolved.to_string())),
    }
}

/// The text for one family. Without `--current` it is the text for each family
/// in use, each under a line with its name.
fn planned(
    request: &Request,
    current: Option<&[u8]>,
    family: Option<Family>,
) -> Result<Vec<u8>, UsageError> {
    let plan = Plan::new(request);
    let used: Vec<Family> = Family::BOTH
        .into_iter()
        .filter(|family| plan.uses(*family))
        .collect();
    let families = match (family, used.as_slice(), current) {
        (Some(family), _, _) => vec![family],
        (None, [], _) => vec![Family::Ipv4],
        (None, [_, _], Some(_)) => {
            return Err(UsageError(
                "both families are in use; say with --family whose dump --current is".to_owned(),
            ));
        }
        (None, used, _) => used.to_vec(),
    };
    let found = match current {
        Some(dump) => current_state(dump, request, &plan)?,
        None => Ruleset::default(),
    };
    let mut text = Vec::new();
    for family in &families {
        let changes = diff::to_plan(&plan, *family, &found);
        let transactions = match current {
            Some(_) => current_to_plan(&changes, *family, &found)?,
            None => restore::from_nothing(&changes, *family).unwrap_or_default(),
        };
        if transactions.is_empty() {
            continue;
        }
        if families.len() > 1 {
            text.extend(format!("# {}\n", family.as_str()).into_bytes());
        }
        text.extend(transactions);
    }
    Ok(text)
}

/// The text of one `iptables-restore`; an error where that is not enough.
fn current_to_plan(
    changes: &[Change],
    family: Family,
    found: &Ruleset,
) -> Result<Vec<u8>, UsageError> {
    let text = |step| match step {
        Step::Transaction(text) => Ok(text),
        Step::DeleteJumps(table) => Err(UsageError(format!(
            "--current: table `{}` has a jump with -m recent or -m connlimit, which iptables-restore cannot delete; \
             `apply` can",
            table.as_str()
        ))),
    };
    let steps = restore::steps(changes, family, found).into_iter();
    Ok(steps.map(text).collect::<Result<Vec<_>, _>>()?.concat())
}

/// The part of the dump in the tables that `apply` would read.
fn current_state(dump: &[u8], request: &Request, plan: &Plan) -> Result<Ruleset, UsageError> {
    let mut found = Ruleset::read(dump, &request.name)?;
    if found.hides(Table::Nat) {
        return Err(UsageError(
            "--current: table `nat` has rules that `nft` made and iptables cannot show".to_owned(),
        ));
    }
    if !request.is_absent() {
        let in_filter = plan.tables.keys().any(|(_, table)| *table == Table::Filter)
            || plan::is_marked(&request.name, found.owned(Table::Nat));
        found.tables.retain(|table, _| match table {
            Table::Nat => true,
            Table::Filter => in_filter,
            _ => false,
        });
    }
    Ok(found)
}
