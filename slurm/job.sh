# ---- the same in every job, from here on ------------------------------------------------------------------------
set +eu # whatever the site's lines have set: here a command may fail, and is asked why

# The work may be done already: by an earlier submission, or by an earlier job of a chain.
if [[ -e $DONE || -e $FINISHED ]]; then
  say "the work is done; nothing to do"
  exit 0
fi

# How far the run is: the step of its newest checkpoint, for what was not saved has to be done again.
kept() {
  local name=
  [[ -r $RUN/checkpoints/latest ]] && read -r name <"$RUN/checkpoints/latest"
  if [[ $name =~ ([0-9]+)$ ]]; then echo $((10#${BASH_REMATCH[1]})); else echo 0; fi
}

# A line in attempts.tsv: event, attempt, time, job, step kept, failed restarts in a row, exit code, reason, nodes.
note() {
  printf '%s\t%s\t%(%s)T\t%s\t%s\t%s\t%s\t%s\t%s\n' \
    "$1" "$attempt" -1 "$SLURM_JOB_ID" "$(kept)" "$idle" "${2:--}" "${3:--}" "$SLURM_JOB_NODELIST" >>"$ATTEMPTS"
}

# Count restarts in a row that failed without progress. An attempt that was asked to stop neither counts nor clears.
judge() {
  if (($(kept) > began)); then
    idle=0
  elif [[ $1 == failed || $1 == lost || $1 == hung ]] && ((attempt > 0)); then
    idle=$((idle + 1))
  fi
}

# Leave for good, with the reason where `videomamba status` finds it.
give_up() {
  say "$1: not started again; see videomamba status $RUN"
  note over "$2" "$3"
  exit "$2"
}

leave_if_cancelled() {
  [[ -e $CANCELLED ]] && give_up "cancelled" 130 cancelled
}

# Whether this may be started once more; if not, leave.
may_go_on() {
  leave_if_cancelled
  ((idle >= 2)) && give_up "two restarts failed without progress" 1 no_progress
  ((attempt >= MAX_RESTARTS)) && give_up "restarted $MAX_RESTARTS times, the limit" 1 max_restarts
  return 0
}

# What earlier attempts came to. It is read from the run folder: a job id says nothing, and a restart count is Slurm's.
attempt=0 idle=0 began=0
if [[ -s $ATTEMPTS ]]; then
  IFS=$'\t' read -r event attempt _ _ began idle _ < <(tail -n 1 "$ATTEMPTS")
  if [[ $event == over ]]; then
    say "an earlier job gave up; see videomamba status $RUN"
    exit 1
  elif [[ $event == start ]]; then # no end: killed with its node, or by a site that gives no time for saving
    reason=lost
    ((was_asked)) && reason=cut
    judge "$reason"
    note end 137 "$reason"
  fi
  may_go_on
  attempt=$((attempt + 1))
fi
leave_if_cancelled
began=$(kept)
rm -f "$UNFINISHED"
LOGS=$WORK/logs/$PART$attempt
mkdir -p "$LOGS"
ln -sfn "$PART$attempt" "$WORK/logs/${PART}latest"
note start
say "attempt $attempt from step $began, job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"

# Where the ranks meet: on the first node, at a port that no other job or earlier attempt uses. Below 32768, where the
# ports that Linux gives to outgoing connections begin.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 101 + ${SLURM_RESTART_COUNT:-0}) % 22000))
unset RANK LOCAL_RANK WORLD_SIZE # the submitting shell's, if any: the ranks have theirs from srun

watch_the_stop &
watcher=$!
start_ranks &
ranks=$!
# `wait` comes back when a trapped signal arrives: wait until the ranks are really gone.
while kill -0 "$ranks" 2>/dev/null; do
  wait "$ranks"
done
wait "$ranks"
code=$?
kill "$watcher" 2>/dev/null

if ((code == 0)) && [[ ! -e $UNFINISHED ]]; then
  note end 0 done
  touch "$FINISHED"
  say "done"
  exit 0
fi
cat "$LOGS/srun.log"
# Signals and exit codes race: what the ranks wrote counts more than how they ended. Preemption sends TERM to all ranks
# (code 143), but so does srun to those that are left when one has failed: then it names that one.
failed_by_itself() {
  grep -E ' tasks? [0-9,-]+: ' "$LOGS/srun.log" | grep -qvE 'Terminated|exit code 143'
}
if [[ -e $UNFINISHED ]]; then
  reason=stopped
elif [[ -e $HUNG ]]; then
  reason=hung
elif [[ -e $STOP ]] || { ((code == 143)) && ! failed_by_itself; }; then
  reason=stopped
else
  reason=failed
fi
judge "$reason"
note end "$code" "$reason"
say "attempt $attempt ended: $reason, exit code $code, step $(kept) is kept"
# A wrong request stays wrong, however often it is made.
[[ $reason == failed ]] && ((code == 2)) && give_up "a wrong request" 2 refused
may_go_on
continue_later
