//! The one door to the world: every process, every file of the kernel, behind
//! one narrow trait, so that the rest can be tried on a host that is not there.

mod lock;
mod netlink;
mod process;
mod programs;
mod system;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::net::Family;
use crate::request::Name;
use crate::ruleset::Ruleset;
pub use lock::Lock;
pub use system::System;

/// Which of the two implementations of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// `iptables-nft`, whose rules live in nftables.
    Nft,
    /// `iptables-legacy`
    Legacy,
}

impl Variant {
    /// `nft` or `legacy`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }

    /// The one that this is not.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }
}

/// How much of a family is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The nat table.
    Nat,
    /// Every table.
    All,
}

/// What is to be read of a family.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// Whose rules.
    pub name: &'a Name,
    /// In which tables.
    pub scope: Scope,
    /// With their counters, which takes iptables a little longer to print.
    pub counters: bool,
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

    /// Reads what is owned.
    ///
    /// # Errors
    /// When the dump cannot be had or is not whole.
    fn read(&self, family: Family, look: Look<'_>) -> Result<Ruleset>;

    /// Runs one transaction of `iptables-restore --noflush`.
    ///
    /// # Errors
    /// When it was refused. What has come of it must then be read.
    fn restore(&self, family: Family, transaction: &[u8]) -> Result<()>;

    /// Whether rules live in the other variant too, where both then act on
    /// every packet.
    fn other_variant_in_use(&self) -> bool;
}
