//! `explain`: any rules, or those of this host.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};

use clap::{Args, ValueEnum};

use super::{FamilyArgument, UsageError, complain, read, style};
use crate::explain::{self, HostFacts};
use crate::frontend::seeing;
use crate::netfilter::{Family, Variant};

/// The arguments of `explain`.
#[derive(Args)]
pub struct ExplainArguments {
    /// The text of iptables-save or ip6tables-save, best with -c: a file, or - for standard input. Without it this
    /// host is read.
    dump: Option<OsString>,
    /// Explain this chain only. May be given several times.
    #[arg(long = "chain", value_name = "NAME")]
    chains: Vec<String>,
    /// The format of the output.
    #[arg(long, default_value = "text")]
    format: ExplainFormat,
    /// Exit with 3 if there is a mistake.
    #[arg(long)]
    exit_code: bool,
    /// The iptables variant of this host.
    #[arg(long, conflicts_with = "dump")]
    variant: Option<VariantArgument>,
    /// The family of the dump, where it does not tell.
    #[arg(long, requires = "dump")]
    family: Option<FamilyArgument>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExplainFormat {
    Text,
    Json,
    Html,
    Prometheus,
}

#[derive(Clone, Copy, ValueEnum)]
enum VariantArgument {
    Nft,
    Legacy,
}

impl From<VariantArgument> for Variant {
    fn from(argument: VariantArgument) -> Self {
        match argument {
            VariantArgument::Nft => Self::Nft,
            VariantArgument::Legacy => Self::Legacy,
        }
    }
}

/// Prints an explanation; returns the exit code.
pub fn print(
    arguments: &ExplainArguments,
    (out, errors): (&mut (impl Write + IsTerminal), &mut impl Write),
) -> io::Result<u8> {
    let (tables, facts) = match &arguments.dump {
        None => match explain::this_host(arguments.variant.map(Variant::from)) {
            Ok(host) => host,
            Err(error) => return complain(&format!("{error:#}"), 1, errors),
        },
        Some(file) => {
            let family = arguments.family.map(Family::from);
            let text = read(file).and_then(|text| Ok(explain::read(&text, family)?));
            match text {
                Ok(tables) => (tables, HostFacts::default()),
                Err(UsageError(problem)) => return complain(&problem, 2, errors),
            }
        }
    };
    let chains = || tables.iter().flat_map(|table| &table.chains);
    let unknown = arguments.chains.iter();
    let mut unknown = unknown.filter(|name| chains().all(|chain| chain.name != **name));
    if let Some(name) = unknown.next() {
        let near = chains().map(|chain| chain.name.as_str());
        let near = near
            .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
        let near = near.map_or_else(String::new, |near| format!("; the nearest is `{near}`"));
        return complain(
            &format!("--chain: there is no chain `{name}`{near}"),
            2,
            errors,
        );
    }
    let explanation = explain::explain(&tables, &arguments.chains, &facts);
    let text = match arguments.format {
        ExplainFormat::Text => seeing::explain::text(&explanation, style(out)),
        ExplainFormat::Json => json(&explanation),
        ExplainFormat::Html => seeing::html::page(&explanation),
        ExplainFormat::Prometheus => seeing::prometheus::explanation(&explanation),
    };
    out.write_all(text.as_bytes())?;
    let mut findings = explanation.chains.iter().map(|chain| &chain.findings);
    let has_findings = !explanation.findings.is_empty() || findings.any(|found| !found.is_empty());
    Ok(match arguments.exit_code && has_findings {
        true => 3,
        false => 0,
    })
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default() + "\n"
}
