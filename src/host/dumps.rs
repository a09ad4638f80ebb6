//! Dumps that are kept from one run of a session to the next.
//!
//! cf-agent keeps the program for all its promises. Of 200 promises that are kept
//! each would read the same rules (`benches/sets.py`). nftables counts its commits,
//! so a dump is still true as long as their number is that of before the dump. A
//! number that was read after the dump would not do: the dump may be older.
//! Legacy has no such number; there each run reads again.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::{Query, Scope, nftables};
use crate::netfilter::Family;

/// The dumps of a session, all of iptables-nft.
#[derive(Debug, Default)]
pub struct Dumps(RefCell<HashMap<(Family, Scope), Kept>>);

#[derive(Debug)]
struct Kept {
    generation: u32,
    text: Rc<[u8]>,
}

impl Dumps {
    /// The dump that answers the query, if it is still true.
    pub(super) fn get(&self, query: Query) -> Option<Rc<[u8]>> {
        let kept = self.0.borrow();
        let kept = kept.get(&(query.family, query.scope))?;
        let is_true = !query.counters && nftables::generation() == Some(kept.generation);
        is_true.then(|| Rc::clone(&kept.text))
    }

    /// The number to keep a dump by, which is about to be made.
    pub(super) fn generation(query: Query) -> Option<u32> {
        (!query.counters).then(nftables::generation)?
    }

    /// Keeps a whole dump that was begun at that generation.
    pub(super) fn keep(&self, query: Query, generation: u32, text: Vec<u8>) {
        let text = text.into();
        let kept = Kept { generation, text };
        let mut dumps = self.0.borrow_mut();
        dumps.insert((query.family, query.scope), kept);
    }
}
