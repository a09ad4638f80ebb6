//! Brings a host to the desired state: observe, diff, apply, verify, and roll
//! back if verification fails.

mod bypass;
mod neighbours;
pub mod outcome;
pub mod prefetch;
mod reconciler;
pub mod retry;
mod rollback;
mod warnings;

use std::rc::Rc;

use anyhow::Result;

use crate::host::Host;
use crate::preflight;
use crate::request::Request;
use outcome::{Outcome, RunMode, Steps};
use prefetch::{Prefetch, Proof};
use reconciler::{Counters, Reconciler};
use warnings::Context;

/// The parts of a run that its caller has.
pub trait Hooks {
    /// Dumps that were started earlier; they decide only whether there is anything
    /// to do.
    fn prefetch(&mut self) -> Prefetch {
        Prefetch::default()
    }

    /// Called under the lock, before the host is read again.
    ///
    /// # Errors
    /// When the request is not the right one any more.
    fn locked(&mut self) -> Result<()> {
        Ok(())
    }

    /// Called with the steps while iptables works on them.
    fn meanwhile(&mut self, _steps: &Steps) {}
}

/// Dumps alone.
impl Hooks for Prefetch {
    fn prefetch(&mut self) -> Prefetch {
        std::mem::take(self)
    }
}

/// Does what the request asks for.
///
/// # Errors
/// When the host cannot be read, or the request would do harm there. Nothing
/// has been changed then. A later failure is in the [`Outcome`].
pub fn converge(
    host: &impl Host,
    request: &Request,
    mode: RunMode,
    hooks: &mut impl Hooks,
) -> Result<Outcome> {
    let facts = preflight::facts(host, request);
    let mut warnings = preflight::check(request, &facts).map_err(anyhow::Error::msg)?;
    let reconciler = Reconciler::new(host, request)?;
    let prefetch = hooks.prefetch();
    let proof = prefetch.proof();
    let counters = match proof {
        Some(_) => Counters::Read,
        None => Counters::Skip,
    };
    let state = reconciler.observe(prefetch, counters)?;
    reconciler.check_forwarding(&state)?;
    let steps = reconciler.drift(&state);
    let lock = match mode {
        RunMode::Apply if !steps.is_empty() => Some(match &proof {
            Some(Proof::Lock(lock)) => Rc::clone(lock),
            Some(Proof::Generation(_)) | None => host.lock()?,
        }),
        RunMode::Apply | RunMode::Check => None,
    };
    if lock.is_some() {
        hooks.locked()?;
    }
    let context = Context {
        host,
        request,
        facts: &facts,
        mode,
    };
    let surroundings = neighbours::begin(context, &state, &steps);
    let attempt = reconciler.attempt(state, steps, proof.as_ref())?;
    let disconnects = reconciler.disconnects(&attempt);
    let around = surroundings.map(|around| around.warnings(&attempt));
    warnings.extend(warnings::before(context, &attempt));
    let mut outcome = match mode {
        RunMode::Apply if !attempt.steps.is_empty() => {
            reconciler.apply(attempt, disconnects, hooks)
        }
        RunMode::Apply | RunMode::Check => reconciler.predict(attempt, disconnects),
    };
    warnings.append(&mut outcome.warnings);
    warnings.extend(warnings::after(context, &outcome));
    warnings.extend(warnings::many_programs(&outcome));
    if outcome.failure.is_none() {
        warnings.extend(around.unwrap_or_default());
    }
    outcome.warnings = warnings;
    outcome.lock = lock;
    Ok(outcome)
}
