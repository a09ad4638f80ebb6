//! The host: every process, file, sysctl, socket and lock, behind one narrow
//! trait, so that everything above can be tested on a host that is not real.
//!
//! This room knows the terms of netfilter and nothing above them.

mod boot;
mod capabilities;
mod clock;
mod conntrack;
mod dumps;
mod facts;
mod files;
mod jumps;
mod lock;
mod netlink;
mod nftables;
mod probe;
mod process;
mod programs;
mod resolver;
mod routes;
mod saves;
pub mod service;
mod state_directory;
mod system;
mod whole_save;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::Result;

use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{ConntrackEntry, Family, Name, Table, Variant};
pub use clock::{seconds_since_1970, since_boot};
pub use conntrack::ReplyFilter;
pub use dumps::Dumps;
pub use facts::{Facts, Questions, Ssh, forwarding_sysctl};
pub use lock::Lock;
pub use probe::{HttpProbe, Probe, ProbeFailure, ProbeMethod, ProbeResult, Prober, SourceKey};
pub use process::CannotStart;
pub use resolver::{Names, lookup, service_port};
pub use routes::{Link, Routes, Way};
pub use state_directory::{Stamp, StateDirectory};
pub use system::System;

/// The tables that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// One table.
    Only(Table),
    /// Every table.
    All,
}

/// One dump.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// The family that is read.
    pub family: Family,
    /// The tables that are read.
    pub scope: Scope,
    /// With counters, which takes iptables a little longer to print.
    pub counters: bool,
}

/// Dumps that have been started.
pub trait PendingRead {
    /// Returns true when nothing is left to wait for.
    fn is_ready(&self) -> bool;

    /// Waits for all dumps; returns what is owned, in the order of the queries.
    ///
    /// # Errors
    /// For each query: when there is no dump, or an incomplete one.
    fn finish(self: Box<Self>) -> Vec<Result<Ruleset>>;
}

/// A whole dump that has been started.
pub trait PendingSave {
    /// Waits for the dump.
    ///
    /// # Errors
    /// When there is no dump, or an incomplete one.
    fn finish(self: Box<Self>) -> Result<Vec<u8>>;
}

/// A host with iptables, of one variant.
pub trait Host {
    /// The variant that is used.
    fn variant(&self) -> Variant;

    /// Returns true if there are programs for the family.
    fn supports(&self, family: Family) -> bool;

    /// Keeps other runs of this program from writing, until the last owner drops it.
    ///
    /// # Errors
    /// When another run holds it for too long, or its file cannot be opened.
    fn lock(&self) -> Result<Rc<Lock>>;

    /// The number of changes of rules so far, by whatever program: a dump that was
    /// begun at a number is true as long as that stays. `None` where nobody counts.
    fn generation(&self) -> Option<u32>;

    /// Starts to read the rules that `name` owns.
    fn begin_read<'a>(&'a self, name: &'a Name, queries: Vec<Query>) -> Box<dyn PendingRead + 'a>;

    /// Starts a dump of all tables of a family, with counters, whoever made the rules. It
    /// is empty where the host does not support the family, or has neither of the tables
    /// nat and filter.
    ///
    /// # Errors
    /// When it cannot be started.
    fn begin_save<'a>(&'a self, family: Family) -> Result<Box<dyn PendingSave + 'a>>;

    /// Runs one transaction of `iptables-restore --noflush`. `meanwhile` is
    /// called once while iptables works, if it got so far.
    ///
    /// # Errors
    /// When it was refused. Its effect must then be read from the host.
    fn restore(
        &self,
        family: Family,
        transaction: &[u8],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<()>;

    /// Deletes the rules of a table that iptables cannot delete by their text, and
    /// that jump from a foreign chain to a chain of `name`.
    ///
    /// # Errors
    /// When the kernel or iptables refuses.
    fn delete_jumps(&self, family: Family, table: Table, name: &Name) -> Result<()>;

    /// Returns true if the other variant has rules too: then both act on every
    /// packet.
    fn other_variant_in_use(&self) -> bool;

    /// Returns true if rules of nftables rewrite sources that iptables does not show.
    fn hides_source_nat(&self) -> bool;

    /// Answers the questions.
    fn facts(&self, questions: &Questions) -> Facts;

    /// Returns true if the family is forwarded; `None` if that cannot be read.
    fn forwarding(&self, family: Family) -> Option<bool>;

    /// Switches forwarding. Switching it off after on restores the former
    /// setting of each interface.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn set_forwarding(&self, family: Family, on: bool) -> Result<()>;

    /// The files that are loaded at boot into the variant that is used.
    ///
    /// # Errors
    /// When there are none.
    fn boot_files(&self) -> Result<BTreeMap<Family, PathBuf>>;

    /// The text of a file; `None` if it does not exist.
    ///
    /// # Errors
    /// When it exists and cannot be read.
    fn load(&self, path: &Path) -> Result<Option<Vec<u8>>>;

    /// Replaces a file as a whole; `None` removes it. A new file gets `mode`.
    ///
    /// # Errors
    /// When it cannot be written. The old file is unchanged then.
    fn store(&self, path: &Path, text: Option<&[u8]>, mode: u32) -> Result<()>;

    /// The identifiers of conntrack entries that have a rewritten destination
    /// and are `wanted`. The filters are a hint that spares the kernel the rest.
    ///
    /// # Errors
    /// When the kernel does not list them.
    fn connections(
        &self,
        family: Family,
        filters: &[ReplyFilter],
        wanted: &dyn Fn(&ConntrackEntry) -> bool,
    ) -> Result<Vec<Vec<u8>>>;

    /// Deletes conntrack entries, so that the next packet of each connection is
    /// a new one.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn delete_connections(&self, family: Family, identifiers: &[Vec<u8>]) -> Result<()>;
}
