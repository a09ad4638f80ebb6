//! CFEngine's promise-type protocol, version 1, with JSON.
//!
//! cf-agent starts the program once and sends it every promise of the type.
//! Each request is one line of JSON and an empty line, and each gets exactly
//! one reply of the same form. The agent waits without a limit, takes a second
//! line for the answer to the next promise, and crashes on an unknown log
//! level. Nothing of a promise passes to the next; dumps may, see
//! `run::Session`.
//!
//! The agent reports as a bug of the module: an info message when only a
//! warning was promised, `repaired` without an info message, `not_kept` or
//! `invalid` without an error or a warning.

use std::io::{self, BufRead, Write};

use serde::Serialize;
use serde_json::Value;

use crate::converge::outcome::RunMode;
use crate::diff::change::Kind;
use crate::netfilter::{Family, Table};
use crate::panic::catch_panic;
use crate::report::{Report, ReportedChange};
use crate::request::{UncheckedRequest, json};
use crate::run::{Invocation, Run};

/// The beginning of the agent's first line.
pub const GREETING: &[u8] = b"cf-agent ";

/// Talks with the agent until it ends. Its first line has been read.
///
/// # Errors
/// When the input cannot be read or a reply cannot be written.
pub fn run(mut input: impl BufRead, out: &mut impl Write, run: Run) -> io::Result<u8> {
    if message(&mut input)?.is_none() {
        return Ok(0);
    }
    let version = env!("CARGO_PKG_VERSION");
    write!(
        out,
        "iptables_balance {version} v1 json_based action_policy\n\n"
    )?;
    out.flush()?;
    while let Some(text) = message(&mut input)? {
        let (reply, last) = answer(&text, run);
        serde_json::to_writer(&mut *out, &reply)?;
        out.write_all(b"\n\n")?;
        out.flush()?;
        if last {
            break;
        }
    }
    Ok(0)
}

/// The lines up to the next empty one; `None` when the input ends before.
fn message(input: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    loop {
        let start = text.len();
        input.read_until(b'\n', &mut text)?;
        match text[start..].strip_suffix(b"\n") {
            None => return Ok(None),
            Some(b"" | b"\r") => {
                text.truncate(start);
                return Ok(Some(text));
            }
            Some(_) => {}
        }
    }
}

/// A reply, as the agent takes it. The order of the keys is that of the
/// protocol's documentation.
#[derive(Serialize)]
struct Reply {
    operation: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    promiser: Option<String>,
    result: &'static str,
    log: Vec<Log>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    result_classes: Vec<String>,
}

#[derive(Serialize)]
struct Log {
    level: Level,
    message: String,
}

/// The levels that are used; the agent aborts on one that it does not know.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Critical,
    Error,
    Warning,
    Info,
    Verbose,
}

/// The reply to a message, and whether it was the last.
fn answer(text: &[u8], run: Run) -> (Reply, bool) {
    let asked = catch_panic(|| Promise::parse(text)).unwrap_or_else(Err);
    let promise = match asked {
        Ok(promise) => promise,
        Err(problem) => {
            return (
                Reply::new("unknown", "error", Level::Error, &problem),
                false,
            );
        }
    };
    let reply = match promise.operation.as_str() {
        "terminate" => return (Reply::silent("terminate", "success"), true),
        "validate_promise" => validate(&promise),
        "evaluate_promise" => evaluate(&promise, run),
        other => Reply::new(
            other,
            "error",
            Level::Error,
            &format!(
                "There is no operation '{}' in this module",
                other.escape_debug()
            ),
        ),
    };
    (
        Reply {
            promiser: Some(promise.promiser),
            ..reply
        },
        false,
    )
}

/// One message of the agent about a promise.
struct Promise {
    operation: String,
    promiser: String,
    attributes: json::Object,
    verbose: bool,
    place: String,
}

impl Promise {
    fn parse(text: &[u8]) -> Result<Self, String> {
        let value = json::parse(lenient(text).as_bytes());
        let value = value.map_err(|error| format!("The agent's message is not JSON: {error}"))?;
        let Value::Object(mut message) = value else {
            return Err("The agent's message is not a JSON object".to_owned());
        };
        let text = |name: &str| {
            message
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let line = message
            .get("line_number")
            .map_or_else(String::new, |line| format!(":{line}"));
        Ok(Self {
            operation: text("operation"),
            promiser: text("promiser"),
            verbose: ["verbose", "debug"].contains(&text("log_level").as_str()),
            place: text("filename") + &line,
            attributes: match message.remove("attributes") {
                None | Some(Value::Null) => json::Object::new(),
                Some(Value::Object(attributes)) => attributes,
                Some(_) => return Err("The attributes are not a JSON object".to_owned()),
            },
        })
    }

    /// The request; in check mode where the agent only warns.
    fn invocation(&self) -> Result<Invocation, String> {
        let mode = match self.attributes.get("action_policy") {
            None => RunMode::Apply,
            Some(policy) => match policy.as_str() {
                Some("fix") => RunMode::Apply,
                Some("warn" | "nop") => RunMode::Check,
                _ => {
                    return Err(format!(
                        "action_policy: {policy} is not one of: fix, warn, nop"
                    ));
                }
            },
        };
        let mut attributes = self.attributes.clone();
        attributes.retain(|name, _| !AGENTS_OWN.contains(&name.as_str()));
        if let Some(name) = ["name", "chain"]
            .into_iter()
            .find(|name| attributes.contains_key(*name))
        {
            return Err(format!("{name}: the promiser is the name; leave this out"));
        }
        attributes.insert("name".to_owned(), self.promiser.clone().into());
        let request = UncheckedRequest::from_json(attributes).map_err(|error| error.to_string())?;
        Ok(Invocation {
            request,
            mode,
            diff: false,
        })
    }

    /// A problem in CFEngine's manner, with the promise that it is about.
    fn worded(&self, problem: &str) -> String {
        let place = match self.place.is_empty() {
            true => String::new(),
            false => format!(" ({})", self.place),
        };
        format!(
            "{} for iptables_balance promise with promiser '{}'{place}",
            quoted(problem),
            self.promiser
        )
    }
}

/// Names that cf-agent adds to the attributes: the common attributes that it
/// passes on, and the members of `body action`.
#[rustfmt::skip]
const AGENTS_OWN: [&str; 14] = [
    "action_policy", "audit", "background", "comment", "expireafter", "handle", "ifelapsed", "log_failed", "log_kept",
    "log_priority", "log_repaired", "log_string", "measurement_class", "report_level",
];

/// The agent escapes neither control bytes nor bytes that are not UTF-8. The
/// former are escaped here, the latter replaced, so that the attribute they
/// stand in can be named.
fn lenient(text: &[u8]) -> String {
    let mut clean = String::with_capacity(text.len());
    for letter in String::from_utf8_lossy(text).trim_end().chars() {
        match letter.is_ascii_control() {
            true => clean.extend(format!("\\u{:04x}", u32::from(letter)).chars()),
            false => clean.push(letter),
        }
    }
    clean
}

/// CFEngine quotes with single quotes.
fn quoted(text: &str) -> String {
    text.replace('`', "'")
}

fn validate(promise: &Promise) -> Reply {
    let operation = "validate_promise";
    let checked = || {
        let request = promise.invocation()?.request;
        request.check().map_err(|error| error.to_string())
    };
    match catch_panic(checked) {
        Ok(Ok(())) => Reply::silent(operation, "valid"),
        Ok(Err(problem)) => Reply::new(
            operation,
            "invalid",
            Level::Error,
            &promise.worded(&problem),
        ),
        Err(bug) => Reply::new(operation, "error", Level::Critical, &promise.worded(&bug)),
    }
}

fn evaluate(promise: &Promise, run: Run) -> Reply {
    let operation = "evaluate_promise";
    let done = catch_panic(|| -> Result<(Report, RunMode), String> {
        let invocation = promise.invocation()?;
        Ok((run(&invocation), invocation.mode))
    });
    let (report, mode) = match done {
        Ok(Ok(done)) => done,
        Ok(Err(problem)) => {
            return Reply::new(
                operation,
                "not_kept",
                Level::Error,
                &promise.worded(&problem),
            );
        }
        Err(bug) => return Reply::new(operation, "error", Level::Critical, &promise.worded(&bug)),
    };
    let result = match (report.failed, report.changed, mode) {
        (true, _, _) | (false, true, RunMode::Check) => "not_kept",
        (false, true, RunMode::Apply) => "repaired",
        (false, false, _) => "kept",
    };
    Reply {
        log: logged(promise, &report, mode),
        result_classes: vec![format!("{}_{result}", promise.promiser)],
        ..Reply::silent(operation, result)
    }
}

/// Silent when kept, one message for each change, and the reason of a failure.
fn logged(promise: &Promise, report: &Report, mode: RunMode) -> Vec<Log> {
    let log = |level, message: &str| Log {
        level,
        message: quoted(message),
    };
    let mut logs: Vec<Log> = report
        .warnings
        .iter()
        .map(|warning| log(Level::Warning, warning))
        .collect();
    if report.failed {
        logs.push(log(Level::Error, &promise.worded(&report.msg)));
        return logs;
    }
    let steps = &report.changes.value;
    if report.balancers.is_some() && steps.len() > MOST_CHANGES {
        logs.extend(summary(promise, report, mode));
        return logs;
    }
    let shown = steps.reported().take(MOST_CHANGES);
    logs.extend(shown.map(|change| match mode {
        RunMode::Apply => log(Level::Info, &done(&change)),
        RunMode::Check => log(
            Level::Warning,
            &format!("Should {}, but only warning promised", to_do(&change)),
        ),
    }));
    if let Some(more @ 1..) = steps.len().checked_sub(MOST_CHANGES) {
        logs.push(match mode {
            RunMode::Apply => log(
                Level::Info,
                &format!("Made {more} more changes of this kind"),
            ),
            RunMode::Check => log(
                Level::Warning,
                &format!("Should make {more} more changes of this kind, but only warning promised"),
            ),
        });
    }
    if promise.verbose {
        logs.push(log(Level::Verbose, &report.msg));
    }
    logs
}

/// One message for each changed balancer of a set, where one for each change would
/// be too many.
fn summary(promise: &Promise, report: &Report, mode: RunMode) -> Vec<Log> {
    let log = |text: String| match mode {
        RunMode::Apply => Log {
            level: Level::Info,
            message: quoted(&format!("Changed {text}")),
        },
        RunMode::Check => Log {
            level: Level::Warning,
            message: quoted(&format!("Should change {text}, but only warning promised")),
        },
    };
    let counted = |count: usize, word: &str| match count {
        1 => format!("1 {word}"),
        _ => format!("{count} {word}s"),
    };
    let set = &promise.promiser;
    let changed = report.changed_balancers();
    let shown = changed.iter().take(MOST_CHANGES);
    let mut logs: Vec<Log> = shown
        .map(|(balancer, count)| {
            let count = counted(*count, "change");
            log(format!(
                "balancer `{balancer}` of set `{set}`, with {count}"
            ))
        })
        .collect();
    let hidden = changed.len().saturating_sub(MOST_CHANGES);
    if hidden > 0 || changed.is_empty() {
        let rest = match changed.is_empty() {
            true => format!("set `{set}`"),
            false => counted(hidden, "more balancer"),
        };
        let count = counted(report.changes.value.len(), "change");
        logs.push(log(format!("{rest}, {count} in all")));
    }
    if promise.verbose {
        logs.push(Log {
            level: Level::Verbose,
            message: quoted(&report.msg),
        });
    }
    logs
}

/// More changes than these are counted instead of shown one by one.
const MOST_CHANGES: usize = 100;

/// `Created chain 'W' in table 'nat' of ipv4`
fn done(change: &ReportedChange) -> String {
    worded_change(
        change,
        &Verbs {
            create: "Created",
            append: "Appended",
            insert: "Inserted",
            replace: "Replaced",
            delete: "Deleted",
            set: "Set",
            write: "Wrote",
        },
    )
}

/// `create chain 'W' in table 'nat' of ipv4`
fn to_do(change: &ReportedChange) -> String {
    worded_change(
        change,
        &Verbs {
            create: "create",
            append: "append",
            insert: "insert",
            replace: "replace",
            delete: "delete",
            set: "set",
            write: "write",
        },
    )
}

struct Verbs {
    create: &'static str,
    append: &'static str,
    insert: &'static str,
    replace: &'static str,
    delete: &'static str,
    set: &'static str,
    write: &'static str,
}

fn worded_change(change: &ReportedChange, verbs: &Verbs) -> String {
    let Verbs {
        create,
        append,
        insert,
        replace,
        delete,
        set,
        write,
    } = verbs;
    let rule = change.rule.as_deref().unwrap_or_default();
    let before = change.before.as_deref().unwrap_or_default();
    let family = change.family.map_or("", Family::as_str);
    let chain = format!(
        "chain '{}' in table '{}' of {family}",
        change.chain.unwrap_or_default(),
        change.table.map_or("", Table::as_str),
    );
    match change.action {
        Kind::CreateChain => format!("{create} {chain}"),
        Kind::AppendRule => format!("{append} rule '{rule}' to {chain}"),
        Kind::InsertRule => format!("{insert} rule '{rule}' into {chain}"),
        Kind::ReplaceRule => format!("{replace} rule '{before}' with '{rule}' in {chain}"),
        Kind::DeleteRule => format!("{delete} rule '{rule}' from {chain}"),
        Kind::DeleteChain => format!("{delete} {chain}"),
        Kind::SetSysctl => format!("{set} '{rule}', which was '{before}'"),
        Kind::WriteFile => format!("{write} file '{rule}'"),
        Kind::DeleteConnections => format!("{delete} connections '{rule}' of {family}"),
    }
}

impl Reply {
    fn silent(operation: &str, result: &'static str) -> Self {
        Self {
            operation: operation.to_owned(),
            promiser: None,
            result,
            log: Vec::new(),
            result_classes: Vec::new(),
        }
    }

    fn new(operation: &str, result: &'static str, level: Level, message: &str) -> Self {
        Self {
            log: vec![Log {
                level,
                message: quoted(message),
            }],
            ..Self::silent(operation, result)
        }
    }
}
