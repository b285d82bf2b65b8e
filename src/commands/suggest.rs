//! `bsap prompts suggest`.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::cli::evaluate::SuggestArgs;
use super::evaluate::{queries_of, read};
use super::{Done, Failure, bar, parts, steps};
use crate::balance::normalise::Normaliser;
use crate::config::Config;
use crate::evaluate::{
    self, Base, Chosen, FALSE_HIT, Finding, Pool, Resolver, Rows, Spec, Suggestion, World, finding,
};
use crate::prompts::{EmbeddedSet, PromptSet};

/// Shipped sets whose texts may be taken: general captions, in the language of the model.
const SHIPPED: [&str; 2] = ["photographs", "ecommerce-en"];

/// Chooses prompts for the stored catalogue, and writes them.
pub async fn run(args: &SuggestArgs, config: Config, token: CancellationToken) -> Done {
    let asked = queries_of(&args.queries, "--queries")?;
    let (store, state) = parts::catalogue(&config).await?;
    let towers = parts::towers(&config)?;
    state.live.expect(&parts::generation(&config, &*towers))?;
    let embed = |record| EmbeddedSet::from_record(record, &*towers).map(Arc::new);
    let sets = state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    let progress = bar("read", 0)?;
    let on_read = steps(&progress);
    let rows = Rows::read(&store, "live", &state.live, towers.clone(), &token, &on_read).await?;
    progress.finish_and_clear();
    let world = World::of(vec![rows]);
    evaluate::enough_judged(&asked, &world).map_err(Failure::usage)?;

    let mut pool = Pool::closed_to(&asked);
    for path in &args.log {
        let log = queries_of(path, "--log")?;
        pool.add(log.iter().map(|asked| asked.text.as_str()));
    }
    for path in &args.pool {
        pool.add(read(path, "--pool")?.lines());
    }
    for name in &args.attributes {
        let values = world.pictures.iter().filter_map(|picture| picture.attributes.get(name));
        let before = pool.texts.len();
        pool.add(values.map(String::as_str));
        if pool.texts.len() == before {
            say!("Note: no image has an attribute {name:?} with a text that is new.");
        }
    }
    if args.shipped {
        for name in SHIPPED {
            pool.add(PromptSet::load(name)?.texts.iter().map(String::as_str));
        }
    }
    if pool.texts.len() < 2 {
        return Err(Failure::usage(
            "the pool has fewer than 2 texts that are no judged queries; give --log, --attribute, --pool or --shipped",
        ));
    }
    say!(
        "{} texts in the pool; {} stand among the judged queries and {} are beyond the largest set",
        pool.texts.len(),
        pool.judged,
        pool.beyond
    );
    let set = PromptSet {
        name: args.name.clone(),
        version: args.set_version,
        language: args.language.clone(),
        notes: String::new(),
        texts: pool.texts,
    };
    let top_k = config.prompts.top_k;
    let suggestion = tokio::task::block_in_place(|| {
        let pool = set.embed(&*towers, top_k)?;
        let mut resolver = Resolver::new(&world, Some(&state), state.serving.clone(), sets, top_k);
        let live = resolver.resolve(&Spec::of(Base::Live, "live"))?;
        let bar = bar("ranked", asked.len() as u64)?;
        let catalogue = store.url().to_string();
        let found =
            evaluate::suggest(&mut resolver, &pool, &live, &asked, &catalogue, &token, &|n| {
                bar.inc(n);
            });
        bar.finish_and_clear();
        anyhow::Ok(found?)
    })?;
    show(args, &suggestion)
}

fn show(args: &SuggestArgs, suggestion: &Suggestion) -> Done {
    say!("{}\n", evaluate::terminal(&suggestion.test));
    let tried = suggestion.choosing.others().count();
    let queries = suggestion.choosing.queries.judged;
    let Some(chosen) = &suggestion.chosen else {
        say!(
            "Of {tried} ways none was better than plain CLIP on the {queries} queries for choosing: serve with weight 0."
        );
        return Ok(());
    };
    let figures = suggestion.test.configurations.iter().find(|o| o.name == "suggested");
    let column = figures.and_then(|outcome| suggestion.test.column(outcome, FALSE_HIT));
    let gain = column.map_or(String::new(), |c| {
        format!(
            " On the other {} queries its false first hits differ from plain CLIP's by {:+.3} ({:+.3} to {:+.3}).",
            suggestion.test.queries.judged, c.gain.mean, c.gain.low, c.gain.high
        )
    });
    let notes = format!(
        "Chosen by bsap prompts suggest out of {tried} ways on {queries} queries, for {}.{gain}\n",
        how(chosen)
    );
    let set = PromptSet { name: args.name.clone(), notes, ..chosen.set.set.clone() };
    write(&args.out, &toml::to_string_pretty(&set)?)?;
    say!(
        "{} of the texts are in {}, for {}. The row live is what is served now.",
        set.texts.len(),
        args.out.display(),
        how(chosen)
    );
    let better = |name: &String| {
        let column = figures.and_then(|outcome| suggestion.test.column(outcome, name));
        column.is_some_and(|column| finding(name, &column) == Finding::Better)
    };
    if !suggestion.test.measures.iter().any(better) {
        say!(
            "On the half that nothing was chosen on, no measure is measurably better than plain CLIP's: have more queries judged before you switch."
        );
    }
    Ok(())
}

/// How the prompts are to be used.
fn how(chosen: &Chosen) -> String {
    let Chosen { normaliser, weight, lambda, .. } = chosen;
    let strength = match normaliser {
        Normaliser::Nnn => format!(" and λ {lambda}"),
        _ => String::new(),
    };
    format!("normaliser {} with weight {weight}{strength}", normaliser.name())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("--out: {}", path.display()))
}
