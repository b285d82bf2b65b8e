//! `bsap reconcile`.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use chrono::{DateTime, TimeDelta, Utc};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::io::{AsyncBufRead, BufReader};
use tokio_util::sync::CancellationToken;

use super::cli::reconcile::ReconcileArgs;
use super::{Done, Failure, parts, publish};
use crate::catalogue::CatalogueState;
use crate::config::Config;
use crate::ingest::source::Decoder;
use crate::publish::{Candidate, Naming, Published, Publisher};
use crate::reconcile::{
    Comparison, Finding, Kind, Report, Rules, Side, reconcile, temporary_folder,
};
use crate::record::Ordering;
use crate::store::{self, Store};

/// Compares each target with the table, and sends what is missing where that is asked for.
pub async fn run(args: &ReconcileArgs, config: Config, token: CancellationToken) -> Done {
    let started = Utc::now();
    refuse(args, &config, started)?;
    let naming = Naming {
        id_prefix: args.id_prefix.clone(),
        attributes: publish::attributes(&args.attributes, &config)?,
        now: false,
        ordering: config.source.ordering,
    };
    let days = TimeDelta::days(config.upkeep.tombstone_days.into());
    let rules = Rules {
        started: args.as_of.unwrap_or(started),
        grace: TimeDelta::seconds(args.grace.into()),
        tolerance: TimeDelta::seconds(args.tolerance.into()),
        remembered: Some(days).filter(|days| !days.is_zero()),
        sequence_is_time: args.sequence_is_time,
        naming,
        attributes: config.attributes.clone(),
    };
    let (catalogue, state) = parts::catalogue(&config).await?;
    belongs(&config, &state)?;
    let publisher = Publisher::new(&config.kafka, &config.source.topic)?;
    let mut whole = true;
    if let Some(file) = &args.ids {
        let decoder = Decoder::new(&config.source, &config.attributes);
        let (name, lines) = open(file).await?;
        let side = Side::List { name, lines, decoder: Box::new(decoder) };
        whole &= one(args, (&catalogue, &state), side, rules, &publisher, &token).await?;
    } else {
        for target in &args.targets {
            let side = place(target, &config)?;
            let rules = Rules { started: Utc::now(), ..rules.clone() };
            whole &= one(args, (&catalogue, &state), side, rules, &publisher, &token).await?;
        }
    }
    match (whole, args.repair) {
        (true, _) => Ok(()),
        (false, false) => {
            Err(anyhow::anyhow!("the table differs; --repair sends the events that mend it").into())
        }
        (false, true) => {
            Err(anyhow::anyhow!("some differences could not be mended; the lines above say why")
                .into())
        }
    }
}

/// What cannot be done whatever is found.
fn refuse(args: &ReconcileArgs, config: &Config, now: DateTime<Utc>) -> Done {
    if args.targets.is_empty() && args.ids.is_none() {
        return Err(Failure::usage(
            "nothing to compare with: name a folder, a bucket prefix or --ids",
        ));
    }
    if args.as_of.is_some_and(|time| time > now) {
        return Err(Failure::usage("--as-of: lies in the future"));
    }
    if !args.repair {
        return Ok(());
    }
    if args.ids.is_some() && args.as_of.is_none() {
        return Err(Failure::usage(
            "--ids with --repair needs --as-of TIME, when the list was begun: what it lacks is deleted \
             as of then",
        ));
    }
    match config.source.ordering {
        Ordering::Sequencer => Err(Failure::usage(
            "source.ordering is `sequencer`: only the bucket's own notifications have one, so nothing \
             can be sent; without --repair the differences are shown",
        )),
        Ordering::Sequence if args.ids.is_none() && !args.sequence_is_time => Err(Failure::usage(
            "source.ordering is `sequence`, which a listing does not have; say --sequence-is-time where \
             it is the time in microseconds, as `bsap publish` sets it, or use --ids with events",
        )),
        _ => Ok(()),
    }
}

/// Versions are compared by the table's ordering; a configuration that says another would compare
/// wrongly.
fn belongs(config: &Config, state: &CatalogueState) -> Done {
    let (stored, configured) = (state.live.ordering, config.source.ordering);
    if stored == configured {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "source.ordering: is `{}`, the catalogue was made with `{}`",
        configured.name(),
        stored.name()
    )))
}

/// A folder that is not there is not an empty one.
fn place(target: &str, config: &Config) -> Result<Side, Failure> {
    let url = store::parse(target).map_err(Failure::usage)?;
    match url.scheme() {
        "http" | "https" => {
            return Err(Failure::usage(format!(
                "{target}: cannot be listed; name a folder or a bucket prefix"
            )));
        }
        "file" => {
            let path = url.to_file_path().unwrap_or_default();
            if !path.is_dir() {
                return Err(Failure::usage(format!("{target}: is not a folder")));
            }
        }
        _ => {}
    }
    let store = Store::open(target, &config.fetch.store_options).map_err(Failure::usage)?;
    Ok(Side::Place(store))
}

async fn open(file: &Path) -> Result<(String, Box<dyn AsyncBufRead + Send + Unpin>), Failure> {
    if file == Path::new("-") {
        return Ok(("standard input".into(), Box::new(BufReader::new(tokio::io::stdin()))));
    }
    let name = file.display().to_string();
    let opened = tokio::fs::File::open(file).await.with_context(|| name.clone());
    Ok((name, Box::new(BufReader::new(opened.map_err(Failure::Usage)?))))
}

/// One comparison; whether nothing is left to be mended.
async fn one(
    args: &ReconcileArgs,
    (catalogue, state): (&Store, &CatalogueState),
    side: Side,
    rules: Rules,
    publisher: &Publisher,
    token: &CancellationToken,
) -> Result<bool, Failure> {
    let folder = args.temp.clone().unwrap_or_else(temporary_folder);
    let (json, limit) = (args.json, args.limit);
    let mut shown = 0;
    let show = move |finding: &Finding| {
        if json {
            say!("{}", json!(finding));
        } else if shown < limit {
            tell(finding);
        }
        shown += 1;
    };
    let compared = reconcile(catalogue, &state.live, side, rules, &folder, show, token).await?;
    let mut report = compared.report.clone();
    if !args.repair {
        print(&report, args);
        return Ok(report.differences() == 0);
    }
    let sent = send(compared, args, publisher, token).await;
    if let Ok(published) = &sent {
        (report.published, report.kept) = (published.published, published.skipped);
    }
    print(&report, args);
    sent?;
    Ok(report.refused == 0 && report.kept == 0)
}

async fn send(
    compared: Comparison,
    args: &ReconcileArgs,
    publisher: &Publisher,
    token: &CancellationToken,
) -> anyhow::Result<Published> {
    compared.check(args.max_deletes)?;
    let wanted = compared.report.differences() - compared.report.refused;
    let bar = ProgressBar::new(wanted);
    bar.set_style(ProgressStyle::with_template("{spinner} {pos}/{len} events sent, {per_sec}")?);
    let on_event = |sent: &Candidate| {
        if let Err(key) = sent {
            bar.suspend(|| {
                remark!("{key} is there, though the listing lacked it; it is not deleted");
            });
        }
        bar.inc(1);
    };
    let done = compared.repair(publisher, token, on_event).await?;
    bar.finish_and_clear();
    publisher.flush(Duration::from_secs(30))?;
    if done.published + done.skipped < wanted {
        anyhow::bail!(
            "interrupted after {} of {wanted} events; start again for the rest",
            done.published
        );
    }
    Ok(done)
}

fn tell(finding: &Finding) {
    let kind = match finding.finding {
        Kind::New => "new",
        Kind::Changed => "changed",
        Kind::Gone => "gone",
    };
    say!("{kind:<8} {}  {}", finding.image_id, finding.why);
    if let Some(refused) = &finding.refused {
        say!("         cannot be mended: {refused}");
    }
}

fn print(report: &Report, args: &ReconcileArgs) {
    if args.json {
        say!("{}", json!({ "report": report }));
        return;
    }
    if report.differences() > args.limit {
        say!("… {} differences, {} shown", report.differences(), args.limit);
    }
    say!("{}", report.target);
    for (count, what) in [
        (report.listed, "listed"),
        (report.stored, "stored"),
        (report.same, "the same"),
        (report.new, "new: listed, not stored"),
        (report.changed, "changed since they were stored"),
        (report.gone, "gone: stored, not listed"),
        (report.recent, "too young to be judged (--grace)"),
        (report.deleted, "listed, but deleted by an event after their last change"),
        (report.elsewhere, "listed, but their id belongs to an image from elsewhere"),
        (report.ignored, "listed, but no pictures by their names"),
        (report.refused, "differences that cannot be mended"),
        (report.kept, "deletes not sent: the object is there, though the listing lacked it"),
        (report.published, "events sent"),
    ] {
        let always = ["listed", "stored", "the same"].contains(&what);
        if count > 0 || always {
            say!("{count:>10}  {what}");
        }
    }
}
