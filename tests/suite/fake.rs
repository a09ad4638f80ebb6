//! A host that is two models, and that can be told to fail.

use std::sync::Mutex;

use anyhow::{Result, bail};
use iptables_balance::host::{Host, Lock, Look, Variant};
use iptables_balance::net::Family;
use iptables_balance::ruleset::Ruleset;

use crate::model::Model;

/// What a restore does instead of what it should.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Refuses.
    Refuse,
    /// Says that it did it, and did nothing.
    Lie,
    /// Does it, and says that it failed.
    Deny,
    /// Does it, and spoils another family's chain besides.
    Spoil,
}

pub struct Fake {
    pub ipv4: Mutex<Model>,
    pub ipv6: Mutex<Model>,
    /// By the number of the restore, from 0.
    pub faults: Vec<(usize, Fault)>,
    pub restores: Mutex<usize>,
}

impl Fake {
    pub fn new(ipv4: Model, ipv6: Model) -> Self {
        Self {
            ipv4: ipv4.into(),
            ipv6: ipv6.into(),
            faults: Vec::new(),
            restores: 0.into(),
        }
    }

    pub fn model(&self, family: Family) -> &Mutex<Model> {
        match family {
            Family::Ipv4 => &self.ipv4,
            Family::Ipv6 => &self.ipv6,
        }
    }

    pub fn dump(&self) -> String {
        Family::BOTH
            .map(|family| self.model(family).lock().unwrap().save())
            .concat()
    }
}

impl Host for Fake {
    fn variant(&self) -> Variant {
        Variant::Nft
    }

    fn supports(&self, _: Family) -> bool {
        true
    }

    fn lock(&self) -> anyhow::Result<Lock> {
        Ok(Lock::none())
    }

    fn read(&self, family: Family, look: Look<'_>) -> Result<Ruleset> {
        let dump = self.model(family).lock().unwrap().save();
        let plain = |line: &str| {
            line.split_once("] ")
                .map_or(line, |(_, rule)| rule)
                .to_owned()
                + "
"
        };
        let dump = if look.counters {
            dump
        } else {
            dump.lines().map(plain).collect()
        };
        Ok(Ruleset::read(dump.as_bytes(), look.name)?)
    }

    fn restore(&self, family: Family, transaction: &[u8]) -> Result<()> {
        let number = std::mem::replace(&mut *self.restores.lock().unwrap(), 0);
        *self.restores.lock().unwrap() = number + 1;
        let fault = self
            .faults
            .iter()
            .find(|(at, _)| *at == number)
            .map(|(_, fault)| *fault);
        if fault == Some(Fault::Refuse) {
            bail!("refused");
        }
        if fault == Some(Fault::Lie) {
            return Ok(());
        }
        let text = String::from_utf8(transaction.to_vec())?;
        self.model(family)
            .lock()
            .unwrap()
            .restore(&text)
            .map_err(|why| anyhow::anyhow!("{why}\n{text}"))?;
        match fault {
            Some(Fault::Deny) => bail!("denied"),
            Some(Fault::Spoil) => {
                let spoiled = "*nat\n:W - [0:0]\nCOMMIT\n";
                self.model(family)
                    .lock()
                    .unwrap()
                    .restore(spoiled)
                    .map_err(anyhow::Error::msg)
            }
            _ => Ok(()),
        }
    }

    fn other_variant_in_use(&self) -> bool {
        false
    }
}
