//! A request on this host: what every front end that acts has in common.

use std::mem;

use anyhow::{Result, anyhow};

use crate::converge::{Meanwhile, converge};
use crate::glance::{Glance, Glancing};
use crate::host::{System, lookup};
use crate::outcome::{Run, Steps};
use crate::report::{Beforehand, Report, Told, planned_shares, worded};
use crate::request::{BadRequest, Draft, Request, State};

/// Carries out a request, or foretells what that would do; with before and
/// after, if `diff`.
#[must_use]
pub fn on_this_host(draft: Draft, run: Run, diff: bool) -> Report {
    let about = (draft.name.clone(), draft.state);
    match perform(draft, run, diff) {
        Ok(report) => report,
        Err(error) if error.is::<BadRequest>() => Report::unread(about, error.to_string()),
        Err(error) => Report::unread(about, format!("{error:#}; nothing was changed")),
    }
}

/// The host's dump waits in its pipe while it is worked out what there should
/// be. What is wrong with the request is said before what is wrong with the host.
fn perform(draft: Draft, run: Run, diff: bool) -> Result<Report> {
    let opened = System::open(draft.variant, draft.wait);
    let host = opened.as_ref().ok();
    let host_to_read = host.filter(|_| draft.state == State::Present);
    let glancing = host_to_read.map(|host| Glance::begin(host, &draft.name));
    let request = draft.resolve(&lookup)?;
    let host = opened.as_ref().map_err(|error| anyhow!("{error:#}"))?;
    let mut teller = Teller {
        request: &request,
        glancing,
        told: Beforehand::default(),
    };
    let outcome = converge(host, &request, run, &mut teller)?;
    let told = mem::take(&mut teller.told);
    drop(teller);
    let mut report = Report::new(&request, outcome, told, run, diff);
    report.take_along((draft, request));
    Ok(report)
}

/// Words the result while the host prints, or else while it takes in what is
/// new.
struct Teller<'a> {
    request: &'a Request,
    glancing: Option<Glancing<'a>>,
    told: Beforehand,
}

impl Teller<'_> {
    fn word_shares(&mut self) {
        if self.told.shares.is_none() {
            self.told.shares = Some(Told::worded(planned_shares(self.request)));
        }
    }
}

impl Meanwhile for Teller<'_> {
    fn glance(&mut self) -> Option<Glance> {
        let glancing = self.glancing.take()?;
        if !glancing.is_ready() {
            self.word_shares();
        }
        Some(glancing.finish())
    }

    fn while_writing(&mut self, steps: &Steps) {
        self.word_shares();
        if steps.effects.is_empty() {
            self.told.changes = worded(steps);
        }
    }
}
