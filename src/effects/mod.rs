//! Side effects: everything except running rules that a balancer needs.
//! Forwarding, files that are loaded at boot, and the end of connections to
//! removed backends.
//!
//! They take the same steps as rules: observed and desired state give effects,
//! and effects are shown, applied and rolled back.

pub mod conntrack;
pub mod draining;
mod routes;
pub mod rules_file;
pub mod sysctl;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::diff;
use crate::diff::change::Kind;
use crate::host::forwarding_sysctl;
use crate::netfilter::Family;
use crate::netfilter::ruleset::Ruleset;
use crate::plan::Plan;
use crate::request::Request;
use conntrack::RemovedBackend;

/// The observed state of a host beside its running rules.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostSettings {
    /// True for a family that is forwarded; without an entry where that cannot
    /// be read.
    pub forwarding: BTreeMap<Family, bool>,
    /// The files that the request is about, by path.
    pub files: BTreeMap<PathBuf, SavedFile>,
}

/// A file as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedFile {
    /// The family of its rules; `None` for a file without rules, or where the
    /// family does not matter.
    pub family: Option<Family>,
    /// The text; `None` if the file does not exist.
    pub text: Option<Vec<u8>>,
    /// The rules in it that are owned; `None` for [`sysctl::FILE`].
    pub ruleset: Option<Ruleset>,
}

/// One side effect.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Switches forwarding.
    Forwarding {
        /// The family.
        family: Family,
        /// The new value.
        on: bool,
    },
    /// Writes a file.
    Write {
        /// Its path.
        path: PathBuf,
        /// The family of its rules.
        family: Option<Family>,
        /// The new text; `None` removes the file.
        text: Option<Vec<u8>>,
    },
    /// Ends the connections to a backend.
    Disconnect(RemovedBackend),
}

impl Effect {
    /// The kind, by the name that results use.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Forwarding { .. } => Kind::SetSysctl,
            Self::Write { .. } => Kind::WriteFile,
            Self::Disconnect(_) => Kind::DeleteConnections,
        }
    }

    /// The family, unless the effect is about both or none.
    #[must_use]
    pub fn family(&self) -> Option<Family> {
        match self {
            Self::Forwarding { family, .. } => Some(*family),
            Self::Write { family, .. } => *family,
            Self::Disconnect(removed) => Some(removed.family),
        }
    }

    /// The state after the effect: `net.ipv4.ip_forward = 1`, a path, or the
    /// deleted connections as `conntrack` spells them.
    #[must_use]
    pub fn shown(&self) -> String {
        match self {
            Self::Forwarding { family, on } => shown_sysctl(*family, *on),
            Self::Write { path, .. } => path.display().to_string(),
            Self::Disconnect(removed) => removed.shown(),
        }
    }

    /// The state of a sysctl before the effect.
    #[must_use]
    pub fn before(&self) -> Option<String> {
        match self {
            Self::Forwarding { family, on } => Some(shown_sysctl(*family, !*on)),
            Self::Write { .. } | Self::Disconnect(_) => None,
        }
    }
}

fn shown_sysctl(family: Family, on: bool) -> String {
    format!("{} = {}", forwarding_sysctl(family), u8::from(on))
}

/// The effects that are still needed, without the end of connections.
#[must_use]
pub fn drift(request: &Request, plan: &Plan, found: &HostSettings) -> Vec<Effect> {
    let is_off = |family: &Family| found.forwarding.get(family) != Some(&true);
    let off = sysctl::requested(request, plan).filter(is_off);
    let switched = off.map(|family| Effect::Forwarding { family, on: true });
    let files = found.files.iter();
    let written = files.filter_map(|(path, file)| file_drift(plan, path, file));
    switched.chain(written).collect()
}

fn file_drift(plan: &Plan, path: &Path, file: &SavedFile) -> Option<Effect> {
    let text = file.text.as_deref().unwrap_or_default();
    let new = match &file.ruleset {
        Some(ruleset) => {
            let changes = diff::to_plan(plan, file.family.unwrap_or(Family::Ipv4), ruleset);
            (!changes.is_empty()).then(|| rules_file::edited(text, &changes))
        }
        None => sysctl::file_text(text, plan),
    };
    Some(Effect::Write {
        path: path.to_owned(),
        family: file.family,
        text: Some(new?),
    })
}

/// The first family that is to be forwarded although it cannot be read if it is.
#[must_use]
pub fn unknown_forwarding(request: &Request, plan: &Plan, found: &HostSettings) -> Option<Family> {
    sysctl::requested(request, plan).find(|family| !found.forwarding.contains_key(family))
}

/// Computes the state after the effects.
#[must_use]
pub fn predict(effects: &[Effect], found: &HostSettings, request: &Request) -> HostSettings {
    let mut after = found.clone();
    for effect in effects {
        match effect {
            Effect::Forwarding { family, on } => {
                after.forwarding.insert(*family, *on);
            }
            Effect::Write { path, text, .. } => {
                if let Some(file) = after.files.get_mut(path) {
                    file.ruleset = file.ruleset.take().and_then(|_| {
                        Ruleset::read(text.as_deref().unwrap_or_default(), &request.name).ok()
                    });
                    file.text.clone_from(text);
                }
            }
            Effect::Disconnect(_) => {}
        }
    }
    after
}

/// The effects that restore the earlier state.
#[must_use]
pub fn rollback(before: &HostSettings, now: &HostSettings) -> Vec<Effect> {
    let switched = before
        .forwarding
        .iter()
        .filter(|(family, on)| now.forwarding.get(family) != Some(on))
        .map(|(family, on)| Effect::Forwarding {
            family: *family,
            on: *on,
        });
    let text_now = |path: &PathBuf| now.files.get(path).and_then(|file| file.text.as_ref());
    let written = before
        .files
        .iter()
        .filter(|(path, file)| text_now(path) != file.text.as_ref())
        .map(|(path, file)| Effect::Write {
            path: path.clone(),
            family: file.family,
            text: file.text.clone(),
        });
    switched.chain(written).collect()
}
