//! The one door to the world: every process, every file of the kernel, behind
//! one narrow trait, so that the rest can be tried on a host that is not there.

mod boot;
mod capabilities;
mod conntrack;
mod facts;
mod files;
mod lock;
mod netlink;
mod nftables;
mod process;
mod programs;
mod resolver;
mod system;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::effects::ConntrackEntry;
pub use crate::netfilter::Variant;
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Table};
use crate::preflight::{Facts, Questions};
use crate::request::Name;
pub use lock::Lock;
pub use resolver::lookup;
pub use system::System;

/// How much of a family is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One table.
    Only(Table),
    /// Every table.
    All,
}

/// What is to be read of a family.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Whose rules.
    pub name: &'a Name,
    /// In which tables.
    pub scope: Scope,
    /// With their counters, which takes iptables a little longer to print.
    pub counters: bool,
}

/// What is being read.
pub trait PendingRead: Send {
    /// Whether there is nothing left to wait for.
    fn is_ready(&self) -> bool;

    /// Waits for it: what is owned.
    ///
    /// # Errors
    /// When the dump cannot be had or is not whole.
    fn finish(self: Box<Self>) -> Result<Ruleset>;
}

/// A host with iptables, of one variant.
pub trait Host: Sync {
    /// Which variant is worked on.
    fn variant(&self) -> Variant;

    /// Whether there are programs for that family at all.
    fn supports(&self, family: Family) -> bool;

    /// Keeps other runs of this program from writing, until it is dropped.
    ///
    /// # Errors
    /// When another one has held it for too long, or it cannot be had at all.
    fn lock(&self) -> Result<Lock>;

    /// Begins to read what is owned.
    fn begin_read<'a>(&'a self, family: Family, look: Query<'a>) -> Box<dyn PendingRead + 'a>;

    /// Runs one transaction of `iptables-restore --noflush`.
    ///
    /// # Errors
    /// When it was refused. What has come of it must then be read.
    fn restore(&self, family: Family, transaction: &[u8]) -> Result<()>;

    /// Whether rules live in the other variant too, where both then act on
    /// every packet.
    fn other_variant_in_use(&self) -> bool;
    /// What else is known of it, as far as it is asked for.
    fn facts(&self, questions: &Questions) -> Facts;

    /// Whether a family is forwarded; `None` where that cannot be known.
    fn forwarding(&self, family: Family) -> Option<bool>;

    /// Switches forwarding. Switching it off after on brings back what each
    /// interface had before.
    ///
    /// # Errors
    /// When the kernel does not let us.
    fn set_forwarding(&self, family: Family, on: bool) -> Result<()>;

    /// The files that are loaded at boot into the variant worked on.
    ///
    /// # Errors
    /// When there are none.
    fn boot_files(&self) -> Result<BTreeMap<Family, PathBuf>>;

    /// The text of a file; `None` where it is not there.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    fn load(&self, path: &Path) -> Result<Option<Vec<u8>>>;

    /// Replaces a file as a whole; `None` removes it.
    ///
    /// # Errors
    /// When it cannot be written. The old one is still there then.
    fn store(&self, path: &Path, text: Option<&[u8]>) -> Result<()>;

    /// The connections with a rewritten destination that are wanted, by what
    /// names each to the kernel.
    ///
    /// # Errors
    /// When the kernel does not tell.
    fn connections(
        &self,
        family: Family,
        wanted: &dyn Fn(&ConntrackEntry) -> bool,
    ) -> Result<Vec<Vec<u8>>>;

    /// Ends connections.
    ///
    /// # Errors
    /// When the kernel does not let us.
    fn end(&self, family: Family, connections: &[Vec<u8>]) -> Result<()>;
}
