//! A dump whose text is kept, whoever made the rules.

use anyhow::Result;

use super::PendingSave;
use super::process::Process;

/// A whole dump; `None` where there is nothing to read.
pub(super) struct WholeSave(Option<Process>);

impl WholeSave {
    pub(super) fn new(process: Option<Process>) -> Self {
        Self(process)
    }
}

impl PendingSave for WholeSave {
    fn finish(self: Box<Self>) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        if let Some(process) = self.0 {
            let finished = process.drain(&mut |piece| text.extend_from_slice(piece));
            finished?.success()?;
        }
        Ok(text)
    }
}
