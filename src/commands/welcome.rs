//! What `bsap` prints without a command.

/// The three ways to begin.
pub const WAYS_TO_BEGIN: &str = "\
bsap: text→image search that can be trusted. Three ways to begin:

  1. See it at work, in a minute and with nothing to set up:

       bsap demo

     draws 600 pictures, ingests them and opens a page on http://127.0.0.1:8080/. As it
     knows what it drew, it marks right and wrong results. `bsap demo --once` only prints.

  2. Try it on your own pictures, still without a Kafka, a bucket or a configuration:

       bsap try ~/Pictures

     embeds a folder, a bucket or a list with a model for photographs, opens the page on
     the results while the rest comes in, and follows changes.

  3. Run it in production, with your Kafka, your storage and your model:

       bsap config example > bsap.toml     every option with its default
       bsap check --config bsap.toml       tries every connection that it names
       bsap ingest --config bsap.toml      a worker, one or more
       bsap serve --config bsap.toml       the query worker, with its page

     docs/getting-started.md goes through it part by part.

`bsap --help` lists all commands, `bsap <command> --help` describes one.";
