//! A person at a terminal, or a script: the subcommands.

use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal, Read, Write};

use lexopt::{Arg, Parser, ValueExt};

use super::invocation::{PLAIN, parse};
use super::{schema, terminal};
use crate::converge::outcome::RunMode;
use crate::diff;
use crate::diff::change::Change;
use crate::host::lookup;
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Table};
use crate::plan::{self, Plan};
use crate::report::Report;
use crate::request::{Request, UncheckedRequest};
use crate::restore::{self, Step};
use crate::run::{Invocation, Run};

/// What `--help` prints.
pub const HELP: &str = "\
iptables_balance spreads new connections over servers with the kernel's iptables.

Usage:
  iptables_balance plan REQUEST [--current DUMP] [--family ipv4|ipv6]
                        print the iptables-restore text that builds the balancer on an
                        empty host, or that turns DUMP (from iptables-save) into it
  iptables_balance apply REQUEST
                        make the host so, and show what was changed
  iptables_balance check REQUEST [--exit-code]
                        show what apply would change; with --exit-code, exit 3 if anything
  iptables_balance schema request|result
                        print the JSON Schema
  iptables_balance --version | --help

REQUEST is a file with a JSON object, or - for standard input.

Without arguments it reads standard input: a JSON request, or CFEngine's promise-type
protocol. With the path of a file of arguments it is an Ansible module.

Exit codes: 0 done, 1 failed, 2 bad usage or bad request, 3 see check.
";

/// Ended before anything was done; exit code 2.
struct UsageError(String);

impl<E: std::error::Error> From<E> for UsageError {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

enum Command {
    Help,
    Version,
    Schema(schema::Kind),
    Plan {
        request: Box<UncheckedRequest>,
        current: Option<Vec<u8>>,
        family: Option<Family>,
    },
    Act {
        request: Box<UncheckedRequest>,
        mode: RunMode,
        exit_code: bool,
    },
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
    match command(arguments) {
        Ok(Command::Help) => out.write_all(HELP.as_bytes()).map(|()| 0),
        Ok(Command::Version) => {
            writeln!(out, "iptables_balance {}", env!("CARGO_PKG_VERSION")).map(|()| 0)
        }
        Ok(Command::Schema(kind)) => writeln!(out, "{}", schema::text(kind)).map(|()| 0),
        Ok(Command::Plan {
            request,
            current,
            family,
        }) => match request.resolve(&lookup) {
            Err(unresolved) => complain(&unresolved.to_string(), 1, errors),
            Ok(request) => match planned(&request, current.as_deref(), family) {
                Ok(text) => out.write_all(&text).map(|()| 0),
                Err(UsageError(problem)) => complain(&problem, 2, errors),
            },
        },
        Ok(Command::Act {
            request,
            mode,
            exit_code,
        }) => {
            let report = run(&Invocation {
                request: *request,
                mode,
                diff: true,
            });
            act(&report, exit_code, out, errors)
        }
        Err(UsageError(problem)) => complain(&problem, 2, errors),
    }
}

fn complain(problem: &str, code: u8, errors: &mut impl Write) -> io::Result<u8> {
    writeln!(errors, "iptables_balance: {problem}")?;
    Ok(code)
}

fn act(
    report: &Report,
    exit_code: bool,
    out: &mut (impl Write + IsTerminal),
    errors: &mut impl Write,
) -> io::Result<u8> {
    for warning in &report.warnings {
        writeln!(errors, "iptables_balance: warning: {warning}")?;
    }
    let style = match out.is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    {
        true => terminal::Style::Terminal,
        false => terminal::Style::Plain,
    };
    out.write_all(terminal::report(report, style).as_bytes())?;
    match (report.failed, exit_code && report.changed) {
        (true, _) => complain(&report.msg, 1, errors),
        (false, true) => Ok(3),
        (false, false) => Ok(0),
    }
}

fn command(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut parser = Parser::from_args(arguments);
    match parser.next()? {
        None | Some(Arg::Short('h') | Arg::Long("help")) => Ok(Command::Help),
        Some(Arg::Short('V') | Arg::Long("version")) => Ok(Command::Version),
        Some(Arg::Value(word)) => match word.string()?.as_str() {
            "plan" => plan(&mut parser),
            "apply" => act_command(&mut parser, RunMode::Apply),
            "check" => act_command(&mut parser, RunMode::Check),
            "schema" => schema_command(&mut parser),
            "help" => Ok(Command::Help),
            other => Err(UsageError(unknown_command(other))),
        },
        Some(other) => Err(other.unexpected().into()),
    }
}

fn unknown_command(word: &str) -> String {
    const KNOWN: [&str; 4] = ["plan", "apply", "check", "schema"];
    let nearest = KNOWN
        .iter()
        .min_by_key(|known| strsim::damerau_levenshtein(word, known));
    let nearest = nearest.copied().unwrap_or_default();
    format!(
        "there is no command `{word}`; the nearest is `{nearest}`, and `--help` lists them (the path of a file of arguments needs a `/`)"
    )
}

fn plan(parser: &mut Parser) -> Result<Command, UsageError> {
    let (mut request, mut current, mut family) = (None, None, None);
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("current") => current = Some(read(&parser.value()?)?),
            Arg::Long("family") => family = Some(family_named(&parser.value()?.string()?)?),
            Arg::Long("help") => return Ok(Command::Help),
            Arg::Value(file) if request.is_none() => request = Some(asked(&file)?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Plan {
        request: request.ok_or_else(no_request)?,
        current,
        family,
    })
}

fn act_command(parser: &mut Parser, mode: RunMode) -> Result<Command, UsageError> {
    let (mut request, mut exit_code) = (None, false);
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("exit-code") if mode == RunMode::Check => exit_code = true,
            Arg::Long("help") => return Ok(Command::Help),
            Arg::Value(file) if request.is_none() => request = Some(asked(&file)?),
            other => return Err(other.unexpected().into()),
        }
    }
    let request = request.ok_or_else(no_request)?;
    Ok(Command::Act {
        request,
        mode,
        exit_code,
    })
}

fn schema_command(parser: &mut Parser) -> Result<Command, UsageError> {
    let kind = match parser.next()? {
        Some(Arg::Value(word)) if word == "request" => schema::Kind::Request,
        Some(Arg::Value(word)) if word == "result" => schema::Kind::Result,
        _ => {
            return Err(UsageError(
                "`schema` takes `request` or `result`".to_owned(),
            ));
        }
    };
    match parser.next()? {
        None => Ok(Command::Schema(kind)),
        Some(other) => Err(other.unexpected().into()),
    }
}

fn no_request() -> UsageError {
    UsageError("no REQUEST was given: a file, or - for standard input".to_owned())
}

fn family_named(word: &str) -> Result<Family, UsageError> {
    let found = Family::BOTH
        .into_iter()
        .find(|family| family.as_str() == word);
    found.ok_or_else(|| UsageError(format!("--family: `{word}` is neither ipv4 nor ipv6")))
}

fn read(file: &OsString) -> Result<Vec<u8>, UsageError> {
    let mut text = Vec::new();
    let read = match file == "-" {
        true => io::stdin().lock().read_to_end(&mut text).map(|_| text),
        false => fs::read(file),
    };
    read.map_err(|error| UsageError(format!("cannot read `{}`: {error}", file.display())))
}

/// A request from a file. The names that plain JSON has beside a request are
/// decided by the subcommand here.
fn asked(file: &OsString) -> Result<Box<UncheckedRequest>, UsageError> {
    let asked = parse(&read(file)?, &PLAIN).map_err(UsageError)?;
    let checked = asked.request.check();
    checked.map_err(|error| UsageError(error.to_string()))?;
    Ok(Box::new(asked.request))
}

/// The text for one family; without `--current`, for each family in use, under
/// a line that says whose it is.
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

/// What the dump has in the tables that `apply` would look at.
fn current_state(dump: &[u8], request: &Request, plan: &Plan) -> Result<Ruleset, UsageError> {
    let mut found = Ruleset::read(dump, &request.name)?;
    if found.hides(Table::Nat) {
        return Err(UsageError(
            "--current: table `nat` has rules that `nft` made and iptables cannot show".to_owned(),
        ));
    }
    if request.balancer().is_some() {
        let mark = plan::filter_mark(&request.name);
        let in_filter = plan.tables.keys().any(|(_, table)| *table == Table::Filter)
            || found.owned(Table::Nat).chains.contains_key(&mark);
        found.tables.retain(|table, _| match table {
            Table::Nat => true,
            Table::Filter => in_filter,
            _ => false,
        });
    }
    Ok(found)
}
