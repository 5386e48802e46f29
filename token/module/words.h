// quote_syslog has each warning and error that a module writes to the system log
// printed to standard error as well.
void quote_syslog(void);
