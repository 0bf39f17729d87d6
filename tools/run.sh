#!/bin/sh
# Serves the bundled models in the foreground, makes one picture through the daemon, and stays until it is stopped.
set -eu
listen=${LISTEN:-127.0.0.1:8080}
first=build/first.png
said=build/listening
: >"$said"
build/sitd serve --models deploy/models --listen "$listen" --log-format text >"$said" &
daemon=$!
trap 'kill -TERM $daemon 2>/dev/null' TERM
trap : INT # Ctrl-C reaches the daemon itself; a second signal would cut its work off

# until COMMAND succeeds, as long as the daemon lives
await() {
    until "$@" 2>/dev/null; do
        kill -0 $daemon 2>/dev/null || { wait $daemon; exit $?; }
        sleep 0.1
    done
}
await grep -q '^listening on ' "$said" # its own word: on a port that is taken another daemon would answer
url=$(sed -n 's/^listening on //p' "$said")
await curl -fsS -o /dev/null "$url/readyz"
curl -fsS "$url/v1/samples" -H 'Content-Type: application/json' -H 'Accept: image/png' -o "$first" \
    -d '{"model":"fashion-sit","class":"ankle boot","seed":7,"guidance":{"scale":3}}'
echo "first picture: $first"
echo "the page:      $url/"
status=0
wait $daemon || status=$?
# a signal ends the first wait while the daemon drains: wait for it in earnest
while kill -0 $daemon 2>/dev/null; do wait $daemon && status=0 || status=$?; done
exit $status
