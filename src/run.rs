//! One invocation on this host, from request to report.

use std::rc::Rc;

use anyhow::{Result, anyhow};

use crate::converge::converge;
use crate::converge::outcome::RunMode;
use crate::converge::prefetch::{PendingPrefetch, Prefetch};
use crate::host::{Dumps, Scope, System, lookup};
use crate::netfilter::Table;
use crate::report::{Prewriter, Report};
use crate::request::{BadRequest, DesiredState, UncheckedRequest};

/// A request, and the form of the answer.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// The request.
    pub request: UncheckedRequest,
    /// Apply, or predict.
    pub mode: RunMode,
    /// Report the state before and after.
    pub diff: bool,
}

/// Runs an invocation: [`on_this_host`], or a stand-in in a test.
pub type Run<'a> = &'a dyn Fn(&Invocation) -> Report;

/// Runs an invocation on this host.
#[must_use]
pub fn on_this_host(invocation: &Invocation) -> Report {
    run(invocation, None)
}

/// Several invocations on this host, one after the other. A dump serves all of
/// them for as long as it is certain that it is true.
#[derive(Default)]
pub struct Session(Rc<Dumps>);

impl Session {
    /// Runs an invocation on this host.
    #[must_use]
    pub fn run(&self, invocation: &Invocation) -> Report {
        run(invocation, Some(&self.0))
    }
}

fn run(invocation: &Invocation, dumps: Option<&Rc<Dumps>>) -> Report {
    let UncheckedRequest { name, state, .. } = &invocation.request;
    match try_run(invocation, dumps) {
        Ok(report) if invocation.diff => report.with_diff(),
        Ok(report) => report,
        Err(error) if error.is::<BadRequest>() => Report::unread(name, *state, error.to_string()),
        Err(error) => Report::unread(name, *state, format!("{error:#}; nothing was changed")),
    }
}

/// The host prints its rules while the request is checked. An error in the
/// request is reported before an error of the host.
fn try_run(invocation: &Invocation, dumps: Option<&Rc<Dumps>>) -> Result<Report> {
    let unchecked = &invocation.request;
    let host = System::open(unchecked.variant.required(), unchecked.wait);
    let host = host.map(|host| match dumps {
        Some(dumps) => host.in_session(dumps),
        None => host,
    });
    let is_present = unchecked.state == DesiredState::Present;
    let scope = match unchecked.mentions_filter() {
        true => Scope::All,
        false => Scope::Only(Table::Nat),
    };
    let pending = match &host {
        Ok(host) if is_present => {
            let with_counters = unchecked.is_set() && dumps.is_none();
            Some(Prefetch::begin(host, &unchecked.name, scope, with_counters))
        }
        _ => None,
    };
    let request = unchecked.resolve(&lookup)?;
    let host = host.as_ref().map_err(|error| anyhow!("{error:#}"))?;
    let prewriter = Prewriter::default();
    let prefetch = || {
        if pending.as_ref().is_some_and(|pending| !pending.is_ready()) {
            prewriter.write_shares(&request);
        }
        pending.map(PendingPrefetch::finish)
    };
    let outcome = converge(host, &request, invocation.mode, prefetch, &mut |steps| {
        prewriter.write_shares(&request);
        prewriter.write_steps(steps);
    })?;
    Ok(Report::new(request, outcome, prewriter, invocation.mode))
}
